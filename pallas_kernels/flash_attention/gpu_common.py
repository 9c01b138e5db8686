"""What the Hopper kernels share: which tiles run, which keys a row sees, scores as exponents."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels._pallas import WGMMA, pl, plgpu
from pallas_kernels.flash_attention.intervals import Bounds
from pallas_kernels.flash_attention.tiles import KernelTiles, Spec

LOG2E = math.log2(math.e)
ROWS = 64  # of the accumulator of one warpgroup
MEMORY_REGISTERS = 24  # per thread of the warpgroup that loads
SMEM_BYTES = 227 * 2**10  # of a block
SMS = 132  # of an H100 SXM
COMPUTE_REGISTERS = {1: 240, 2: 240, 3: 160}  # by the number of compute warpgroups
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SWIZZLED_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


class Visible(NamedTuple):
    """What the intervals let a tile do, as arrays in GMEM; causal and window are part of them.

    `bounds` are the key tiles of every tile of rows, or the other way round.
    """

    bounds: Bounds
    low: Int[Array, "b h T"]
    high: Int[Array, "b h T"]


def tile_bounds(visible: Visible | None, b, h, tile, otherwise: Callable[[], tuple]) -> tuple:
    """start <= full_start <= full_stop <= stop of one tile, read or computed by `otherwise`."""
    if visible is None:
        start, stop, full_start, full_stop = otherwise()
    else:
        start, stop, full_start, full_stop = (ref[*_at(ref, b, h), tile] for ref in visible.bounds)
    stop = jnp.maximum(start, stop)
    start = jnp.minimum(start, stop)  # loses the varying axes of a loaded scalar, as loops need
    full_start = jnp.clip(full_start, start, stop)
    return start, full_start, jnp.clip(full_stop, full_start, stop), stop


def seen(
    spec: Spec, visible: Visible | None, b, h, shape: tuple[int, int], row_axis: int, row, key
) -> jax.Array:
    """Which scores of a tile count; its first query row is `row`, its first key is `key`."""
    keys = plgpu.broadcasted_iota(jnp.int32, shape, 1 - row_axis, layout=WGMMA) + key
    if visible is None and not spec.causal and spec.window is None:
        return keys < spec.kv_length
    layout = WGMMA.reduce(1 - row_axis)
    if visible is None:
        rows = plgpu.broadcasted_iota(jnp.int32, (shape[row_axis],), 0, layout=layout)
        low, high = limits(spec, rows + row)
    else:

        def read(ref: Any) -> jax.Array:
            at = *_at(ref, b, h), pl.ds(row, shape[row_axis])
            return plgpu.load(ref.at[*at], layout=layout, optimized=False)

        low, high = read(visible.low), read(visible.high)
    inside = keys < lax.broadcast_in_dim(high, shape, (row_axis,))
    if visible is not None or spec.window is not None:
        inside &= keys >= lax.broadcast_in_dim(low, shape, (row_axis,))
    return inside


def _at(ref, b, h) -> tuple:
    return (b if ref.shape[0] > 1 else 0), (h if ref.shape[1] > 1 else 0)


def limits(spec: Spec, row):
    """Keys `[low, high)` that a row sees by causality, window and the number of keys."""
    low = jnp.zeros_like(row) if spec.window is None else row + (spec.q_offset - spec.window + 1)
    high = jnp.full_like(row, spec.kv_length)
    return low, jnp.minimum(high, row + (spec.q_offset + 1)) if spec.causal else high


def row_tile_bounds(spec: Spec, tiles: KernelTiles, index) -> tuple:
    """`intervals.row_bounds` of query tile `index` where there are no intervals."""
    first = index * tiles.q
    last = jnp.minimum(first + tiles.q, spec.q_length) - 1
    (low, high), (last_low, last_high) = (
        [jnp.clip(x, 0, spec.kv_length) for x in limits(spec, row)] for row in (first, last)
    )
    return (
        lax.div(low, tiles.kv),
        _up(last_high, tiles.kv),
        _up(last_low, tiles.kv),
        lax.div(high, tiles.kv),
    )


def column_tile_bounds(spec: Spec, tiles: KernelTiles, index) -> tuple:
    """`intervals.column_bounds` of key tile `index` where there are no intervals."""
    first, last = index * tiles.kv, index * tiles.kv + (tiles.kv - 1)
    start = full_start = jnp.int32(0)
    stop = full_stop = jnp.int32(spec.q_length)
    if spec.causal:
        start, full_start = first - spec.q_offset, last - spec.q_offset
    if spec.window is not None:
        stop, full_stop = (x + (spec.window - spec.q_offset) for x in (last, first))
    full_stop = jnp.where(last < spec.kv_length, full_stop, 0)
    start, full_start, stop, full_stop = (
        jnp.clip(x, 0, spec.q_length) for x in (start, full_start, stop, full_stop)
    )
    # Rows past the last have no probability, so that the tile of the last row may count as full.
    whole = jnp.where(full_stop == spec.q_length, tiles.q - 1, 0)
    return (
        lax.div(start, tiles.q),
        _up(stop, tiles.q),
        _up(full_start, tiles.q),
        lax.div(full_stop + whole, tiles.q),
    )


def _up(count, size: int):
    return lax.div(count + (size - 1), size)


def walk_rows(spec: Spec, tiles: KernelTiles, ranges, b, kv_head, tile, visit: Callable, state):
    """Visit the query tiles that see key tile `tile`, of every query head that reads the key head.

    state = visit(masked, query head, n - i, i, state) at the n-th step, for query tile i. Returns
    the number of steps and the last state.

    Heads that see the same go through a query tile together, from the last tile to the first.
    Blocks of different key tiles then read the same queries at about the same time, one from
    memory and the others from L2; head after head, they would drift apart by whole heads. Each
    begins with another head, so that not all add to one tile of dq.
    """
    if spec.group > 1 and (ranges is None or ranges.bounds.start.shape[1] == 1):
        start, full_start, full_stop, stop = tile_bounds(
            ranges, b, kv_head, tile, lambda: column_tile_bounds(spec, tiles, tile)
        )

        def turn(masked, n, state):
            i = stop - 1 - lax.div(n, spec.group)
            h = kv_head * spec.group + lax.rem(n + tile, spec.group)
            return visit(masked, h, n - i, i, state)

        for first, last, masked in (
            (stop, full_stop, True),
            (full_stop, full_start, False),
            (full_start, start, True),
        ):
            steps = (stop - first) * spec.group, (stop - last) * spec.group
            state = lax.fori_loop(*steps, functools.partial(turn, masked), state)
        return (stop - start) * spec.group, state

    def head(member, carry):
        n, state = carry
        h = kv_head * spec.group + member
        start, full_start, full_stop, stop = tile_bounds(
            ranges, b, h, tile, lambda: column_tile_bounds(spec, tiles, tile)
        )
        for first, last, masked in (
            (start, full_start, True),
            (full_start, full_stop, False),
            (full_stop, stop, True),
        ):
            step = functools.partial(visit, masked, h, n - start)
            state = lax.fori_loop(first, last, step, state)
        return n + stop - start, state

    return lax.fori_loop(0, spec.group, head, (jnp.int32(0), state))


def key_gradients(k: jax.Array, v: jax.Array, sums: dict[str, Any], spec: Spec) -> tuple:
    """The types of what a kernel writes: dk and dv, or one array that stacks both.

    Stacked if they are alike and no result yet but terms of a sum: so they can travel as they lie.
    """
    dk, dv = (
        jax.ShapeDtypeStruct(x.shape, jnp.float32 if name in sums else spec.out_dtype)
        for name, x in (("dk", k), ("dv", v))
    )
    if sums or dk != dv or spec.out_dtype == spec.dtype:
        return dk, dv
    return (jax.ShapeDtypeStruct((2, *dk.shape), dk.dtype),)


def write_gradient(
    written: Sequence[Any], value: jax.Array, sums: dict, name: str, at: tuple, through: Any = None
):
    """Store a block's gradient, added to what `sums[name]` has at the same place if it is there.

    By way of the SMEM tile `through`, if there is one, and TMA: threads would write half sectors.
    """
    which = ("dk", "dv").index(name)
    gmem = written[which].at[*at] if len(written) == 2 else written[0].at[which, *at]
    if name in sums:
        value += plgpu.load(sums[name].at[*at], layout=WGMMA, optimized=False)
    if through is None:
        gmem[...] = value.astype(gmem.dtype)
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    through[...] = value.astype(gmem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, gmem)


def again(index):
    """The index of a warpgroup for the next step of a loop: the same, as only we know.

    A compiler that knows keeps the descriptors of all products with the warpgroup's tiles in
    registers, one by one, and spills.
    """
    return jnp.bitwise_and(index, 7)


def probability_scale(spec: Spec) -> float:
    """What the probabilities of a backward pass are multiplied by.

    By the scale of the scores, which their gradients then have; but float16 holds no less than
    6e-8, and probabilities of long sequences get near it.
    """
    return 1.0 if spec.dtype == jnp.float16 else spec.scale


def exponent_scale(spec: Spec) -> float:
    """The factor that turns `capped` into an exponent of 2."""
    return LOG2E * (spec.scale if spec.soft_cap is None else spec.soft_cap)


def capped(s: jax.Array, spec: Spec) -> jax.Array:
    """The product q k^T, or with a soft cap tanh(scale q k^T / cap)."""
    return s if spec.soft_cap is None else jnp.tanh(s * (spec.scale / spec.soft_cap))


def per_row(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per row, spread along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def per_column(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per column, spread along the rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def accumulate(accumulator, a: jax.Array, b, spare) -> None:
    """accumulator += a b, with a in registers; in the interpreter through the SMEM ref `spare`.

    The interpreter has neither a product with a register operand nor a store to an accumulator.
    """
    if spare is None:
        plgpu.wgmma(accumulator, a, b)
        return
    spare[...] = a
    plgpu.commit_smem()

    def product(acc):
        plgpu.wgmma(acc, spare, b)
        return acc[...]

    accumulator[...] += pl.run_scoped(product, plgpu.ACC(accumulator.shape, jnp.float32))


def accumulators(body: Callable, shapes: Sequence[tuple[int, int]], spares: Sequence[Any]):
    """body(*accumulators of zeros): in registers, or in the interpreter the SMEM refs `spares`."""
    if spares[0] is None:
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    for spare in spares:
        spare[...] = jnp.zeros(spare.shape, jnp.float32)
    return body(*spares)


def smem(*shape: int, dtype, transforms=()) -> Any:
    """An array in SMEM; operands of products are `SWIZZLED`."""
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def awaited(barriers, steps, stages: int) -> None:
    """Wait for the completions of a ring's last tiles: every one has to be awaited by someone."""

    def wait(step, _):
        plgpu.barrier_wait(barriers.at[lax.rem(step, stages)])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)
