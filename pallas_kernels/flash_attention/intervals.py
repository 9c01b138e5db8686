"""Which keys a row sees, and from it which tiles run and which of those need a mask.

A row sees one interval of keys `[low, high)`, possibly empty. For a tile of rows the key tiles
that run lie between the smallest low and the largest high of its non-empty rows; those between
the largest low and the smallest high are seen whole by every row and need no mask. The mask of
every other tile is computed from the rows' own low and high, so bounds may be loose but never
wrong, also where the rows of a column are not contiguous. All of it is computed once per call,
outside the kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.tiles import Spec, Tiles


class Bounds(NamedTuple):
    """Tiles `[start, stop)` run and of these `[full_start, full_stop)` need no mask.

    int32 `[b, h, tiles]`: `b` is 1 or the batch, `h` is 1 or the query heads. Where nothing is
    seen `start == stop`; `start <= full_start <= full_stop <= stop` always.
    """

    start: Int[Array, "b h tiles"]
    stop: Int[Array, "b h tiles"]
    full_start: Int[Array, "b h tiles"]
    full_stop: Int[Array, "b h tiles"]


def row_limits(
    spec: Spec,
    rows: Int[Array, "..."],
    lo: Int[Array, "..."] | None,
    hi: Int[Array, "..."] | None,
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """The keys `[low, high)` seen by the rows `rows`, whose explicit limits are `lo` and `hi`.

    The intersection of `[0, S)`, causal, window and `[lo, hi)`; empty where `high <= low`. The
    three arrays broadcast against each other.
    """
    low, high = jnp.zeros_like(rows), jnp.full_like(rows, spec.kv_length)
    if spec.window is not None:
        low = jnp.maximum(low, rows + (spec.q_offset - spec.window + 1))
    if spec.causal:
        high = jnp.minimum(high, rows + (spec.q_offset + 1))
    if lo is not None and hi is not None:
        low, high = jnp.maximum(low, lo), jnp.minimum(high, hi)
    return low, high


def row_bounds(
    spec: Spec,
    lo: Int[Array, "b h T"] | None,
    hi: Int[Array, "b h T"] | None,
    tiles: Tiles,
) -> Bounds:
    """For every tile of `tiles.q` rows, the tiles of `tiles.kv` keys that it needs."""
    rows = jnp.arange(spec.q_length, dtype=jnp.int32)[None, None]
    low, high = row_limits(spec, rows, lo, hi)
    count = -(-spec.q_length // tiles.q)
    padding = [(0, 0), (0, 0), (0, count * tiles.q - spec.q_length)]

    def split(x: Array, fill: int | bool) -> Array:
        return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:2], count, tiles.q)

    empty = high <= low
    most = spec.kv_length
    start = split(jnp.where(empty, most, low), most).min(-1) // tiles.kv
    stop = -(-split(jnp.where(empty, 0, high), 0).max(-1) // tiles.kv)
    # Rows after the last are never read, so they ask for no mask; an empty row asks for one.
    full_start = -(-split(jnp.where(empty, most, low), 0).max(-1) // tiles.kv)
    full_stop = split(jnp.where(empty, 0, high), most).min(-1) // tiles.kv
    return _ordered(start, stop, full_start, full_stop)


def column_bounds(
    spec: Spec,
    lo: Int[Array, "b h T"] | None,
    hi: Int[Array, "b h T"] | None,
    tiles: Tiles,
) -> Bounds:
    """For every tile of `tiles.kv` keys, the tiles of `tiles.q` rows that need it.

    The transpose of `row_bounds`. Where the rows that need a key tile are not contiguous, their
    hull runs; where those that see it whole are not, all of them are masked.
    """
    rows = row_bounds(spec, lo, hi, tiles)
    count = -(-spec.kv_length // tiles.kv)
    start, stop, _ = _transpose(rows.start, rows.stop, count)
    full_start, full_stop, full = _transpose(rows.full_start, rows.full_stop, count)
    contiguous = full == full_stop - full_start
    return _ordered(start, stop, full_start, jnp.where(contiguous, full_stop, full_start))


def _ordered(start: Array, stop: Array, full_start: Array, full_stop: Array) -> Bounds:
    start = jnp.minimum(start, stop)
    full_start = jnp.clip(full_start, start, stop)
    return Bounds(start, stop, full_start, jnp.clip(full_stop, full_start, stop))


def _transpose(start: Array, stop: Array, count: int) -> tuple[Array, Array, Array]:
    """First member, last member + 1 and size of `{i: start_i <= j < stop_i}` for `j < count`.

    XLA fuses the comparison of all pairs with its reductions: one kernel, and no table in memory.
    """
    members = start.shape[-1]
    shape = (*start.shape[:-1], count, members)
    tile, index = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
    member = (start[..., None, :] <= tile) & (tile < stop[..., None, :])
    size = member.sum(-1, dtype=jnp.int32)
    first = jnp.where(member, index, members).min(-1)
    last = jnp.where(member, index + 1, 0).max(-1)
    return jnp.where(size == 0, 0, first), last, size
