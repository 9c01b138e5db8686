"""Kernel: what each segment of the sequence adds to the state. gpu_common.py has the picture."""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.lightning_attention import gpu_common as common
from pallas_kernels.lightning_attention.gpu_common import CHUNK, Documents, Split

NEGLIGIBLE = 48.0  # bits
STAGES = 3
PARTS = 2  # blocks that share a segment


class Direction(NamedTuple):
    """The state sum b (x) c: (k, v) forwards in time, (q, do) in reverse."""

    b: Float[Array, "B T H D"]
    c: Float[Array, "B T H E"]
    reverse: bool


def partial_states(
    directions: Sequence[Direction],
    rate: Float[Array, "H"],
    doc_start: Int[Array, "B N"] | None,
    split: Split,
    count: int,
) -> list[Float[Array, "G B H D E"]]:
    """The state that each segment builds from nothing, in order of time.

    Only `count` segments: the last ones in each direction are left out. Chunks are taken from a
    segment's far end backwards: nothing is ever rescaled, and the chunks read last are the first
    that `sweep` will ask for. Chunks whose weights are all below 2^-48 vanish in float32 beside
    the newest and are not read; where all segments are asked for, it is for the state behind the
    last one, and the newest are those next to that. What is left is little of most heads and much
    of those that decay slowest, so blocks share a segment, and the last heads, ALiBi's slowest,
    start first.
    """
    (B, _, H, D), E = directions[0].b.shape, directions[0].c.shape[3]
    dtype = directions[0].c.dtype
    workers = 2 if E % (2 * CHUNK) == 0 else 1

    def body(inputs, rate_ref, reach_ref, doc_ref, outs):
        batch, head, piece, chosen, group = (lax.axis_index(name) for name in common.GRID)
        head, index, part = H - 1 - head, lax.div(piece, PARTS), lax.rem(piece, PARTS)
        worker = lax.axis_index("worker")
        documents = Documents(None if doc_ref is None else doc_ref.at[batch], split.length)

        def run(b_smem, c_smem, scaled_smem, loaded, consumed):
            def walk(reverse):
                """The chunks of the segment, how many are ours, and where the n-th begins."""
                segment = index + (split.segments - count if reverse else 0)
                first, chunks = split.chunk_range(segment)
                behind = first if reverse else split.chunks - first - chunks
                nearest = reach_ref[head] - (behind if count == split.segments else 0)
                read = jnp.clip(nearest, 0, chunks)
                skip, stop = (lax.div(read * p, PARTS) for p in (part, part + 1))

                def position(n):
                    return CHUNK * (first + (skip + n if reverse else chunks - 1 - skip - n))

                return first, chunks, stop - skip, position

            def load(p):
                b, c = inputs[p]
                *_, steps, position = walk(directions[p].reverse)

                def copy(n, slot):
                    rows, barrier = pl.ds(position(n), CHUNK), loaded.at[slot]
                    plgpu.copy_gmem_to_smem(b.at[batch, rows, head], b_smem.at[slot], barrier)
                    common.copy_slices(
                        c.at[batch, rows, head], c_smem.at[slot], barrier, group, workers
                    )

                common.produce(steps, STAGES, consumed, copy)

            def compute(p):
                reverse = directions[p].reverse
                first, chunks, steps, position = walk(reverse)
                start = first * CHUNK
                end = jnp.minimum(start + chunks * CHUNK, split.length)

                def accumulate(*accumulators):
                    def release(n):
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(consumed.at[lax.rem(n, STAGES)])

                    @pl.loop(0, steps)
                    def _(n):
                        slot, at = lax.rem(n, STAGES), position(n)
                        scaled = scaled_smem.at[worker, lax.rem(n, 2)]
                        weight = common.decay_into_state(rate_ref[head], at, start, end, reverse)
                        weight = documents.into_state(weight, at, start, end, reverse)
                        plgpu.barrier_wait(loaded.at[slot])
                        common.scale(scaled, c_smem.at[slot, worker], weight)
                        pl.when(n > 0)(lambda: release(n - 1))
                        plgpu.commit_smem()
                        for m, accumulator in enumerate(accumulators):
                            common.add_outer(b_smem.at[slot], scaled, True, m, accumulator)

                    pl.when(steps > 0)(lambda: release(steps - 1))
                    return tuple(accumulator[...] for accumulator in accumulators)

                tiles = pl.run_scoped(accumulate, *[common.ACCUMULATOR] * (D // CHUNK))
                for m, tile in enumerate(tiles):
                    place = common.state_tile(group * workers + worker, m, by_columns=True)
                    outs[p][index, part, batch, head, *place] = tile

            for p in range(len(directions)):
                mine = chosen == p
                pl.when(mine & (worker == workers))(lambda p=p: load(p))
                pl.when(mine & (worker < workers))(lambda p=p: compute(p))

        pl.run_scoped(
            run,
            common.smem(dtype, STAGES, CHUNK, D),
            common.smem(dtype, STAGES, workers, CHUNK, CHUNK),
            common.smem(dtype, workers, 2, CHUNK, CHUNK),
            plgpu.Barrier(num_arrivals=1 + workers, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=workers, num_barriers=STAGES),
            collective_axes="worker",
        )

    shape = jax.ShapeDtypeStruct((count, PARTS, B, H, D, E), jnp.float32)
    (states,) = plgpu.kernel(
        body,
        out_type=([shape] * len(directions),),
        grid=(B, H, count * PARTS, len(directions), E // CHUNK // workers),
        grid_names=common.GRID,
        num_threads=workers + 1,
        thread_name="worker",
        compiler_params=common.COMPILER,
    )([(d.b, d.c) for d in directions], rate, _reach(rate), doc_start)
    return [functools.reduce(operator.add, jnp.unstack(state, axis=1)) for state in states]


def _reach(rate: Float[Array, "H"]) -> Int[Array, "H"]:
    """How many chunks a state remembers."""
    bits_per_chunk = jnp.maximum(-rate * CHUNK, 1e-7)
    return 1 + jnp.ceil(NEGLIGIBLE / bits_per_chunk).astype(jnp.int32)
