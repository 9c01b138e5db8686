"""Kernel: one sweep over the sequence gives o, dq, dk or dv. gpu_common.py has the picture."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import WGMMA, pl, plgpu
from pallas_kernels.lightning_attention import gpu_common as common
from pallas_kernels.lightning_attention.gpu_common import CHUNK, Documents, Split


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One of o, dq, dk, dv: see the table in gpu_common.py.

    The slices of c are columns of the state for o and dv, rows of it for dq and dk. `initial` has
    the state with which each segment begins; `final` asks for that after the last.
    """

    a: Float[Array, "B T H W"]
    b: Float[Array, "B T H W"]
    c: Float[Array, "B T H V"]
    initial: Float[Array, "G B H D E"] | None
    reverse: bool = False
    by_columns: bool = True
    final: bool = False

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[B, H, D, E]."""
        batch, _, heads, width = self.b.shape
        widths = (width, self.c.shape[3])
        return (batch, heads, *(widths if self.by_columns else widths[::-1]))


def sweep(
    sweeps: Sequence[Sweep],
    rate: Float[Array, "H"],
    doc_start: Int[Array, "B N"] | None,
    split: Split,
    *,
    workers: int,
    stages: int,
) -> tuple[list[Float[Array, "B T H V"]], list[Float[Array, "B H D E"]]]:
    """Run sweeps of equal shapes side by side: their rows, and the final states asked for."""
    (B, T, H, W), V = sweeps[0].b.shape, sweeps[0].c.shape[3]
    dtype, tiles = sweeps[0].c.dtype, W // CHUNK
    wide = tiles > 2  # registers cannot hold the sums beside such a state: less at a time
    with_final = [p for p, s in enumerate(sweeps) if s.final]

    def body(inputs, initials, rate_ref, doc_ref, outs, finals):
        batch, head, segment, chosen, group = (lax.axis_index(name) for name in common.GRID)
        worker = lax.axis_index("worker")
        mine = group * workers + worker
        documents = Documents(None if doc_ref is None else doc_ref.at[batch], split.length)
        first, count = split.chunk_range(segment)

        def position(n, reverse):
            return (first + (count - 1 - n if reverse else n)) * CHUNK

        def run(a_smem, b_smem, c_smem, scaled, pair, state_smem, out, loaded, consumed):
            def load(p):
                a, b, c = inputs[p]

                def copy(n, slot):
                    rows, barrier = pl.ds(position(n, sweeps[p].reverse), CHUNK), loaded.at[slot]
                    plgpu.copy_gmem_to_smem(a.at[batch, rows, head], a_smem.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(b.at[batch, rows, head], b_smem.at[slot], barrier)
                    common.copy_slices(
                        c.at[batch, rows, head], c_smem.at[slot], barrier, group, workers
                    )

                common.produce(count, stages, consumed, copy)

            def places(p):
                return [common.state_tile(mine, m, sweeps[p].by_columns) for m in range(tiles)]

            def initial_state(p):
                zero = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), WGMMA)
                if initials[p] is None:
                    return (zero,) * tiles
                # Adding to zero also rids a loaded value of its varying mesh axes, which the
                # values computed in a kernel do not have: they could not share a loop.
                refs = (initials[p].at[segment, batch, head, *place] for place in places(p))
                return tuple(zero + plgpu.load(x, layout=WGMMA, optimized=False) for x in refs)

            def compute(p, scaled, pair, state_smem, out):
                reverse, by_columns = sweeps[p].reverse, sweeps[p].by_columns
                rate = rate_ref[head]
                pair_decay = None if wide else common.pair_decay(rate, reverse)

                def publish(state):
                    for m, tile in enumerate(state):
                        state_smem[m] = tile.astype(dtype)
                    plgpu.commit_smem()

                def step(n, state):
                    slot, start = lax.rem(n, stages), position(n, reverse)
                    end = jnp.minimum(start + CHUNK, split.length)
                    a, b, c = a_smem.at[slot], b_smem.at[slot], c_smem.at[slot, worker]
                    into = common.decay_into_state(rate, start, start, end, reverse)
                    into = documents.into_state(into, start, start, end, reverse)
                    out_of = common.decay_out_of_state(rate, end - start, reverse)
                    out_of = documents.out_of_state(out_of, start, reverse)
                    through = common.power(rate, end - start)
                    through = documents.through(through, start, end, reverse)

                    def score(accumulator):
                        plgpu.wgmma(accumulator, a, b.T)

                    def carry(accumulator):
                        for m in range(tiles):
                            tile = state_smem.at[m] if by_columns else state_smem.at[m].T
                            plgpu.wgmma(accumulator, a.at[:, pl.ds(m * CHUNK, CHUNK)], tile)

                    def scale():
                        common.scale(scaled, c, into)

                    def stay(accumulator):
                        plgpu.wgmma(accumulator, pair, c)

                    def finish(local, carried):
                        return (local + carried * common.over_rows(out_of)).astype(dtype)

                    add = functools.partial(common.add_outer, b, scaled, by_columns)
                    grow = [functools.partial(add, m) for m in range(tiles)]

                    if wide:  # As few values at a time as can be.
                        plgpu.barrier_wait(loaded.at[slot])
                        scale()
                        (scores,) = common.products([score])
                        weights = common.pair_decay(rate_ref[head], reverse)
                        weights = documents.within(weights, start, reverse)
                        pair[...] = (scores * weights).astype(dtype)
                        plgpu.commit_smem()
                        rows = finish(*common.products([stay, carry]))
                        batches = itertools.batched(grow, 2)
                        added = [tile for some in batches for tile in common.products(some)]
                    else:  # As much in flight as can be.
                        weights = documents.within(pair_decay, start, reverse)
                        plgpu.barrier_wait(loaded.at[slot])
                        scores, carried = common.products([score, carry], meanwhile=scale)
                        pair[...] = (scores * weights).astype(dtype)
                        plgpu.commit_smem()
                        local, *added = common.products([stay, *grow])
                        rows = finish(local, carried)
                    plgpu.barrier_arrive(consumed.at[slot])
                    state = tuple(
                        through * old + new for old, new in zip(state, added, strict=True)
                    )

                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = rows
                    publish(state)
                    place = (batch, pl.ds(start, CHUNK), head, pl.ds(mine * CHUNK, CHUNK))
                    plgpu.copy_smem_to_gmem(out, outs[p].at[place])
                    return state

                state = initial_state(p)
                publish(state)
                state = lax.fori_loop(0, count, step, state)
                if sweeps[p].final:

                    @pl.when(segment == (0 if reverse else split.segments - 1))
                    def _():
                        for place, tile in zip(places(p), state, strict=True):
                            finals[with_final.index(p)][batch, head, *place] = tile

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(worker == workers)
            def _():
                plgpu.set_max_registers(40, action="decrease")
                for p in range(len(sweeps)):
                    pl.when(chosen == p)(lambda p=p: load(p))

            @pl.when(worker < workers)
            def _():
                plgpu.set_max_registers(232, action="increase")
                own = [x.at[worker] for x in (scaled, pair, state_smem, out)]
                for p in range(len(sweeps)):
                    pl.when(chosen == p)(lambda p=p: compute(p, *own))

        pl.run_scoped(
            run,
            common.smem(dtype, stages, CHUNK, W),
            common.smem(dtype, stages, CHUNK, W),
            common.smem(dtype, stages, workers, CHUNK, CHUNK),
            common.smem(dtype, workers, CHUNK, CHUNK),
            common.smem(dtype, workers, CHUNK, CHUNK),
            common.smem(dtype, workers, tiles, CHUNK, CHUNK),
            common.smem(dtype, workers, CHUNK, CHUNK),
            plgpu.Barrier(num_arrivals=2 + workers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            collective_axes="worker",
        )

    states = [jax.ShapeDtypeStruct(sweeps[p].state_shape, jnp.float32) for p in with_final]
    return plgpu.kernel(
        body,
        out_type=([jax.ShapeDtypeStruct((B, T, H, V), dtype)] * len(sweeps), states),
        grid=(B, H, split.segments, len(sweeps), V // CHUNK // workers),
        grid_names=common.GRID,
        num_threads=workers + 1,
        thread_name="worker",
        compiler_params=common.COMPILER,
    )([(s.a, s.b, s.c) for s in sweeps], [s.initial for s in sweeps], rate, doc_start)
