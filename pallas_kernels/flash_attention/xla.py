"""Blockwise flash attention in plain JAX: runs anywhere, memory linear in the length.

Rows go tile by tile; for one tile of rows a loop runs over the key tiles between the tile's
bounds only (`intervals.row_bounds`, taken over batch and heads together), with the online
softmax of arXiv 2205.14135. The backward visits the same tiles once: the rows' gradient is a
tile of the loop, the gradients of k and v are summed into whole float32 arrays.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention.intervals import row_bounds, row_limits
from pallas_kernels.flash_attention.pieces import Pieces, whole
from pallas_kernels.flash_attention.tiles import XLA_TILES, Spec, Tiles

Carry = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]
Gradients = tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]
Sums = tuple[
    Float[Array, "B T H D"] | None, Float[Array, "B S K D"] | None, Float[Array, "B S K E"] | None
]


def unsupported(spec: Spec) -> str | None:
    """Nothing is."""
    return None


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"] | Pieces,
    v: Float[Array, "B S K E"] | Pieces,
    lo: Int[Array, "B h R"] | None,
    hi: Int[Array, "B h R"] | None,
    carry: Carry | None,
    *,
    spec: Spec,
    tiles: Tiles | None = None,
) -> Carry:
    """Attention output in `spec.out_dtype` and lse (float32, natural log) of the last rows.

    There are R = `spec.q_length` of them. With `carry`, the float32 output and lse over other keys
    of all of these or the last, the result is that over both sets.
    """
    q, k, v, carry = whole(q, k, v, carry, spec)
    walk = _Walk(spec, tiles, lo, hi)
    axes = varying_axes(q, k, v, lo, hi, *(carry or ()))
    q, k, v = walk.rows(q), walk.keys(k), walk.keys(v)
    if carry is not None:
        carry = walk.rows(carry[0]), walk.rows(carry[1], axis=2)

    def row_tile(i: Array) -> Carry:
        low, high = walk.limits(i)
        q_i = walk.rows_at(q, i)

        def key_tile(j: Array, state: tuple[Array, Array, Array]):
            m, l, o = state
            s, _ = walk.scores(q_i, walk.keys_at(k, j), low, high, j)
            m_new = jnp.maximum(m, s.max(-1))
            m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p, shrink = jnp.exp(s - m_safe[..., None]), jnp.exp(m - m_safe)
            o_j = walk.product("bkgts,bske->bkgte", p.astype(v.dtype), walk.keys_at(v, j))
            return m_new, shrink * l + p.sum(-1), shrink[..., None] * o + o_j

        if carry is None:
            shape = (spec.batch, spec.kv_heads, spec.group, walk.tiles.q)
            m, l = jnp.full(shape, -jnp.inf, spec.wide), jnp.zeros(shape, spec.wide)
            o = jnp.zeros((*shape, spec.value_width), spec.wide)
        else:
            m = walk.grouped(walk.rows_at(carry[1], i, axis=2))
            l = (m > -jnp.inf).astype(spec.wide)
            o = jnp.moveaxis(walk.split_heads(walk.rows_at(carry[0], i)), 1, 3)
        state = unify_varying((m, l, o), axes)
        m, l, o = lax.fori_loop(walk.start[i], walk.stop[i], key_tile, state)
        lse = jnp.where(l == 0, -jnp.inf, m + jnp.log(jnp.where(l == 0, 1.0, l)))
        o = o / jnp.where(l == 0, 1.0, l)[..., None]
        o = jnp.moveaxis(o, 3, 1).astype(spec.out_dtype)
        return walk.join_heads(o), lse.reshape(spec.batch, spec.q_heads, walk.tiles.q)

    o, lse = lax.map(row_tile, jnp.arange(walk.count, dtype=jnp.int32))
    return walk.join_rows(o), walk.join_rows(lse, axis=2)


def bwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    lo: Int[Array, "B h T"] | None,
    hi: Int[Array, "B h T"] | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    accumulate: Sums,
    *,
    spec: Spec,
    tiles: Tiles | None = None,
) -> Gradients:
    """Gradients of q, k and v from these keys, for rows whose lse is over all their keys.

    `delta` is rowsum(do o) - dlse. A gradient is added to its float32 array in
    `accumulate`; where that is None, it has `spec.out_dtype`.
    """
    walk = _Walk(spec, tiles, lo, hi)
    axes = varying_axes(q, k, v, lo, hi, do, lse, delta, *accumulate)
    dq_before, *before = accumulate
    dk, dv = (
        jnp.zeros(x.shape, spec.wide) if y is None else y
        for x, y in zip((k, v), before, strict=True)
    )
    dk_v = unify_varying((walk.keys(dk), walk.keys(dv)), axes)
    q, do, k, v = walk.rows(q), walk.rows(do.astype(v.dtype)), walk.keys(k), walk.keys(v)
    # A row without keys has lse -inf; all of its scores are masked, whatever is subtracted.
    lse = walk.rows(jnp.where(lse == -jnp.inf, 0.0, lse), axis=2)
    delta = walk.rows(delta, axis=2)

    def row_tile(dk_v: tuple[Array, Array], i: Array):
        low, high = walk.limits(i)
        q_i, do_i = walk.rows_at(q, i), walk.split_heads(walk.rows_at(do, i))
        lse_i, delta_i = (walk.grouped(walk.rows_at(x, i, axis=2))[..., None] for x in (lse, delta))

        def key_tile(j: Array, state: tuple[Array, Array, Array]):
            dq, dk, dv = state
            k_j, v_j = walk.keys_at(k, j), walk.keys_at(v, j)
            s, slope = walk.scores(q_i, k_j, low, high, j)
            p = jnp.exp(s - lse_i)
            dp = walk.product("btkge,bske->bkgts", do_i, v_j)
            ds = (p * (dp - delta_i) * slope).astype(k.dtype)
            dq += walk.product("bkgts,bskd->btkgd", ds, k_j)
            dk_j = walk.product("bkgts,btkgd->bskd", ds, walk.split_heads(q_i))
            dv_j = walk.product("bkgts,btkge->bske", p.astype(v.dtype), do_i)
            return dq, walk.add_keys_at(dk, j, dk_j), walk.add_keys_at(dv, j, dv_j)

        shape = (spec.batch, walk.tiles.q, spec.kv_heads, spec.group, spec.key_width)
        dq = unify_varying(jnp.zeros(shape, spec.wide), axes)
        dq, dk, dv = lax.fori_loop(walk.start[i], walk.stop[i], key_tile, (dq, *dk_v))
        dq = walk.join_heads(dq)
        return (dk, dv), dq if dq_before is not None else dq.astype(spec.out_dtype)

    dk_v, dq = lax.scan(row_tile, dk_v, jnp.arange(walk.count, dtype=jnp.int32))
    dq, (dk, dv) = walk.join_rows(dq), (x[:, : spec.kv_length] for x in dk_v)
    dq = dq if dq_before is None else dq_before + dq
    dk, dv = (
        x.astype(spec.out_dtype) if y is None else x for x, y in zip((dk, dv), before, strict=True)
    )
    return dq, dk, dv


class _Walk:
    """How one call walks over its tiles: cutting, padding, bounds, and the scores of a tile."""

    def __init__(self, spec: Spec, tiles: Tiles | None, lo: Array | None, hi: Array | None):
        tiles = tiles or XLA_TILES
        self.spec = spec
        self.tiles = Tiles(min(tiles.q, spec.q_length), min(tiles.kv, spec.kv_length))
        bounds = row_bounds(spec, lo, hi, self.tiles)
        self.start, self.stop = bounds.start.min((0, 1)), bounds.stop.max((0, 1))
        self.count = self.start.size
        self.lo, self.hi = (None if x is None else self.rows(x, axis=2) for x in (lo, hi))

    def rows(self, x: Array, axis: int = 1) -> Array:
        """`x` with its rows padded to whole tiles."""
        return _pad(x, axis, self.tiles.q)

    def keys(self, x: Array) -> Array:
        return _pad(x, 1, self.tiles.kv)

    def rows_at(self, x: Array, i: Array, axis: int = 1) -> Array:
        return lax.dynamic_slice_in_dim(x, i * self.tiles.q, self.tiles.q, axis)

    def keys_at(self, x: Array, j: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, j * self.tiles.kv, self.tiles.kv, 1)

    def add_keys_at(self, x: Array, j: Array, update: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, self.keys_at(x, j) + update, j * self.tiles.kv, 1)

    def join_rows(self, x: Array, axis: int = 1) -> Array:
        """Whole array from its row tiles, stacked in front."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return lax.slice_in_dim(x, 0, self.spec.q_length, axis=axis)

    def split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.spec.kv_heads, self.spec.group, x.shape[-1])

    def join_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.spec.q_heads, x.shape[-1])

    def grouped(self, x: Array) -> Array:
        """`[b, h, n]` to `[b, K, G, n]`, or `[b, 1, 1, n]` where the heads share it."""
        heads = (1, 1) if x.shape[1] == 1 else (self.spec.kv_heads, self.spec.group)
        return x.reshape(x.shape[0], *heads, x.shape[2])

    def limits(self, i: Array) -> tuple[Array, Array]:
        """The limits of row tile `i`, `[b, K, G, tile, 1]` with ones where they are shared."""
        rows = i * self.tiles.q + jnp.arange(self.tiles.q, dtype=jnp.int32)
        lo, hi = (None if x is None else self.rows_at(x, i, 2) for x in (self.lo, self.hi))
        low, high = row_limits(self.spec, rows[None, None], lo, hi)
        return self.grouped(low)[..., None], self.grouped(high)[..., None]

    def product(self, equation: str, a: Array, b: Array) -> Array:
        # float32 means float32: without "highest", GPUs round it to TF32 and TPUs to bfloat16.
        precision = "highest" if a.dtype == self.spec.wide else None
        return jnp.einsum(
            equation, a, b, precision=precision, preferred_element_type=self.spec.wide
        )

    def scores(self, q_i: Array, k_j: Array, low: Array, high: Array, j: Array):
        """Masked scores `[B, K, G, q tile, kv tile]` and their slope in q.k."""
        spec = self.spec
        s = spec.scale * self.product("btkgd,bskd->bkgts", self.split_heads(q_i), k_j)
        slope = spec.scale
        if spec.soft_cap is not None:
            t = jnp.tanh(s / spec.soft_cap)
            s, slope = spec.soft_cap * t, spec.scale * (1 - t * t)
        keys = j * self.tiles.kv + jnp.arange(self.tiles.kv, dtype=jnp.int32)
        keys = keys[None, None, None, None]
        return jnp.where((low <= keys) & (keys < high), s, -jnp.inf), slope


def _pad(x: Array, axis: int, multiple: int) -> Array:
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
