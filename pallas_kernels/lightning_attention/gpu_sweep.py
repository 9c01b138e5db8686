"""draft"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import pl, plgpu

CHUNK = 64
SLICE = 64
LOG2E = 1.4426950408889634
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Sweep:
    a: jax.Array
    b: jax.Array
    c: jax.Array
    reverse: bool
    initial: jax.Array | None = None


def smem(*shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


def power(rate, exponent):
    return jnp.exp2(rate * exponent.astype(jnp.float32))


def across(row, shape):
    return lax.broadcast_in_dim(row, shape, [0])


def product(a, b, width):
    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((CHUNK, width), jnp.float32))


class Chunk:
    """Decays inside one chunk of tokens, cut at document boundaries."""

    def __init__(self, reverse, rate, start, size, doc, length):
        row = plgpu.layout_cast(lax.iota(jnp.int32, CHUNK), ROW)
        after = jnp.maximum(size - 1 - row, 0)
        to_carry, to_query = (row + 1, after) if reverse else (after, row + 1)
        self.carry = power(rate, size)
        self.key = power(rate, to_carry)
        self.query = power(rate, to_query)
        i = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        j = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=plgpu.Layout.WGMMA)
        distance = j - i if reverse else i - j
        seen = distance >= 0
        if doc is not None:
            begins = plgpu.load(doc.at[pl.ds(start, CHUNK)], layout=ROW, optimized=False)
            if reverse:
                column = plgpu.load(doc.at[pl.ds(start, CHUNK)], layout=COLUMN, optimized=False)
                seen &= lax.broadcast_in_dim(column, seen.shape, [1]) <= start + i
                last = doc[jnp.minimum(start + CHUNK, length - 1)]
                self.query = jnp.where(start + row >= last, self.query, 0)
                self.key = jnp.where(begins < start, self.key, 0)
            else:
                seen &= across(begins, seen.shape) <= start + j
                last = doc[jnp.minimum(start + CHUNK, length) - 1]
                self.query = jnp.where(begins < start, self.query, 0)
                self.key = jnp.where(start + row >= last, self.key, 0)
            self.carry = jnp.where(last < start, self.carry, 0)
        self.pair = jnp.where(seen, power(rate, distance), 0)


def sweep(
    sweeps: Sequence[Sweep],
    log_decay: Float[Array, "H"],
    doc_start: Int[Array, "B N"] | None,
    *,
    length: int,
    workers: int,
    stages: int,
    interpret=None,
):
    first = sweeps[0]
    B, T, H, W = first.a.shape
    V = first.c.shape[-1]
    dtype = first.a.dtype
    chunks = pl.cdiv(length, CHUNK)
    groups = V // SLICE // workers
    rate = jnp.maximum(log_decay.astype(jnp.float32) * LOG2E, -1e4)
    pieces = W // SLICE
    segments = 1

    inputs = [(s.a, s.b, s.c) for s in sweeps]
    initial = [s.initial for s in sweeps]

    def body(inputs, initial, rate_ref, doc_ref, outs, finals):
        segment, batch, head = (lax.axis_index(n) for n in ("segment", "batch", "head"))
        problem, group, worker = (lax.axis_index(n) for n in ("problem", "group", "worker"))

        def scoped(a_s, b_s, c_s, scaled_s, pair_s, state_s, out_s, loaded, consumed):
            def load(p):
                a, b, c = inputs[p]
                reverse = sweeps[p].reverse

                @pl.loop(0, chunks)
                def _(n):
                    slot = lax.rem(n, stages)

                    @pl.when(n >= stages)
                    def _():
                        plgpu.barrier_wait(consumed.at[slot])

                    rows = pl.ds((chunks - 1 - n if reverse else n) * CHUNK, CHUNK)
                    for x, x_s in ((a, a_s), (b, b_s)):
                        plgpu.copy_gmem_to_smem(
                            x.at[batch, rows, head], x_s.at[slot], loaded.at[slot]
                        )
                    for w in range(workers):
                        columns = pl.ds((group * workers + w) * SLICE, SLICE)
                        plgpu.copy_gmem_to_smem(
                            c.at[batch, rows, head, columns], c_s.at[slot, w], loaded.at[slot]
                        )

                @pl.loop(max(0, chunks - stages), chunks)
                def _(n):
                    plgpu.barrier_wait(consumed.at[lax.rem(n, stages)])

            def compute(p):
                reverse = sweeps[p].reverse
                rate = rate_ref[head]
                columns = pl.ds((group * workers + worker) * SLICE, SLICE)
                scaled, pair, held, out = (x.at[worker] for x in (scaled_s, pair_s, state_s, out_s))
                doc = None if doc_ref is None else doc_ref.at[batch]

                def show(state):
                    for n, piece in enumerate(state):
                        held[:, pl.ds(n * SLICE, SLICE)] = piece.astype(dtype)
                    plgpu.commit_smem()

                def step(n, state):
                    slot = lax.rem(n, stages)
                    start = (chunks - 1 - n if reverse else n) * CHUNK
                    size = jnp.minimum(CHUNK, length - start)
                    decay = Chunk(reverse, rate, start, size, doc, length)
                    a, b, c = a_s.at[slot], b_s.at[slot], c_s.at[slot, worker]
                    plgpu.barrier_wait(loaded.at[slot])
                    scores = product(a, b.T, CHUNK)
                    carried = product(a, held.T, SLICE)
                    values = plgpu.load(c, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    scaled[...] = (values * across(decay.key, values.shape)).astype(dtype)
                    pair[...] = (scores * decay.pair).astype(dtype)
                    plgpu.commit_smem()
                    local = product(pair, c, SLICE)
                    state = tuple(
                        decay.carry * piece
                        + product(scaled.T, b.at[:, pl.ds(m * SLICE, SLICE)], SLICE)
                        for m, piece in enumerate(state)
                    )
                    plgpu.barrier_arrive(consumed.at[slot])
                    rows = local + carried * across(decay.query, carried.shape)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = rows.astype(dtype)
                    show(state)
                    plgpu.copy_smem_to_gmem(
                        out, outs[p].at[batch, pl.ds(start, CHUNK), head, columns]
                    )
                    return state

                if initial[p] is None:
                    zero = plgpu.layout_cast(
                        jnp.zeros((SLICE, SLICE), jnp.float32), plgpu.Layout.WGMMA
                    )
                    state = (zero,) * pieces
                else:
                    state = tuple(
                        plgpu.load(
                            initial[p].at[batch, head, columns, pl.ds(n * SLICE, SLICE)],
                            layout=plgpu.Layout.WGMMA,
                            optimized=False,
                        )
                        for n in range(pieces)
                    )
                show(state)
                state = lax.fori_loop(0, chunks, step, state)
                for n, piece in enumerate(state):
                    finals[p].at[batch, head, columns, pl.ds(n * SLICE, SLICE)][...] = piece
                plgpu.wait_smem_to_gmem(0)

            @pl.when(worker == workers)
            def _():
                plgpu.set_max_registers(40, action="decrease")
                for p in range(len(sweeps)):
                    pl.when(problem == p)(lambda p=p: load(p))

            @pl.when(worker < workers)
            def _():
                plgpu.set_max_registers(232, action="increase")
                for p in range(len(sweeps)):
                    pl.when(problem == p)(lambda p=p: compute(p))

        pl.run_scoped(
            scoped,
            smem(stages, CHUNK, W, dtype=dtype),
            smem(stages, CHUNK, W, dtype=dtype),
            smem(stages, workers, CHUNK, SLICE, dtype=dtype),
            smem(workers, CHUNK, SLICE, dtype=dtype),
            smem(workers, CHUNK, CHUNK, dtype=dtype),
            smem(workers, SLICE, W, dtype=dtype),
            smem(workers, CHUNK, SLICE, dtype=dtype),
            plgpu.Barrier(num_arrivals=2 + workers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            collective_axes="worker",
        )

    out_type = (
        [jax.ShapeDtypeStruct((B, T, H, V), dtype) for _ in sweeps],
        [jax.ShapeDtypeStruct((B, H, V, W), jnp.float32) for _ in sweeps],
    )
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(segments, B, H, len(sweeps), groups),
        grid_names=("segment", "batch", "head", "problem", "group"),
        num_threads=workers + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(inputs, initial, rate, doc_start)
