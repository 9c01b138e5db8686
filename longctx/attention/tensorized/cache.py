"""Mixed-radix attention over a cache, equal to the full pass.

The first hop reads the usual cache of keys (not rotated, since every hop rotates its own) and
values. Every later hop reads the values made by the hop before it, of the last
stride x window tokens: a ring of so many rows, n_1 for two dimensions in slow-first order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.attention.slots import append
from longctx.attention.tensorized.mixed_radix import Hop, attend_along
from longctx.parallel.ulysses import repeat_heads

type Hops = tuple[tuple[int, Hop], ...]


def ring_lengths(hops: Hops, max_length: int) -> tuple[int, ...]:
    """Rows of the ring of every hop but the first."""
    return tuple(
        max_length if hop.window is None else min(max_length, hop.stride * hop.window)
        for _, hop in hops[1:]
    )


def tensorized_cache_attention(
    q: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    rings: tuple[Float[Array, "B R H E"], ...],
    start: Int[Array, "B"],
    new: Int[Array, "B"],
    *,
    hops: Hops,
    frequencies: Float[Array, "D/2"] | None = None,
    self_bias: Float[Array, "L H"] | None = None,
) -> tuple[Float[Array, "B T H E"], tuple[Float[Array, "B R H E"], ...]]:
    """Outputs of the tokens at positions start[b] + t, t < new[b], and the rings after them.

    `keys` and `values` hold the new tokens already; `hops` are those of `make_hops`. One token
    reads sum_i n_i keys; more are computed like a sequence of the cache's length.
    """
    rings = tuple(rings)
    biases = [None if self_bias is None or i == 0 else self_bias[i - 1] for i, _ in hops]
    if q.shape[1] == 1:
        return _one_token(q, keys, values, rings, start, hops, biases, frequencies)
    queries = append(jnp.zeros((*keys.shape[:2], *q.shape[2:]), q.dtype), q, start, new)
    slots = jnp.arange(keys.shape[1], dtype=start.dtype)[None]
    is_new = (slots >= start[:, None])[..., None, None]
    x, kept = values, []
    for j, ((_, hop), bias) in enumerate(zip(hops, biases, strict=True)):
        if j:
            ring = rings[j - 1]
            length = ring.shape[1]
            old = _rows(ring, jnp.broadcast_to(slots % length, keys.shape[:2]))
            x = jnp.where(is_new, x, old.astype(x.dtype))
            last = (start + new)[:, None] - 1
            place = jnp.arange(length, dtype=start.dtype)[None]
            newest = last - (last - place) % length  # negative: nothing was there yet
            kept.append(_rows(x, jnp.maximum(newest, 0)).astype(ring.dtype))
        x = attend_along(hop, queries, keys, x, bias, frequencies, None)
    position = start[:, None] + jnp.arange(q.shape[1], dtype=start.dtype)[None]
    o = _rows(repeat_heads(x, q.shape[2]), jnp.minimum(position, keys.shape[1] - 1))
    return o, tuple(kept)


def _one_token(
    q: Array,
    keys: Array,
    values: Array,
    rings: tuple[Array, ...],
    position: Int[Array, "B"],
    hops: Hops,
    biases: list[Array | None],
    frequencies: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    """The same for one token a row: gather what each hop sees."""
    heads, wide = q.shape[2], jnp.promote_types(q.dtype, jnp.float32)
    o, kept = _rows(values, position[:, None]), []
    for j, ((_, hop), bias) in enumerate(zip(hops, biases, strict=True)):
        window = -(-keys.shape[1] // hop.stride) if hop.window is None else hop.window
        seen = position[:, None] - hop.stride * jnp.arange(window, dtype=position.dtype)[None]
        where = jnp.maximum(seen, 0)
        if j:
            ring, length = rings[j - 1], rings[j - 1].shape[1]
            row = jnp.arange(ring.shape[0])
            ring = ring.at[row, position % length].set(o[:, 0].astype(ring.dtype))
            kept.append(ring)
            x = _rows(ring, where % length)
        else:
            x = _rows(values, where)
        q_r = hop.rotated(position[:, None], frequencies, q)[:, 0]
        k_r = repeat_heads(hop.rotated(where, frequencies, _rows(keys, where)), heads)
        product = jnp.einsum(
            "bhd,bnhd->bhn", q_r, k_r, precision="highest", preferred_element_type=wide
        )
        s = hop.scale * product
        if bias is not None:
            s = s.at[..., 0].add(bias[None])
        p = jax.nn.softmax(jnp.where((seen >= 0)[:, None], s, -jnp.inf), axis=-1)
        o = jnp.einsum("bhn,bnhe->bhe", p.astype(x.dtype), repeat_heads(x, heads))[:, None]
    return repeat_heads(o, heads), tuple(kept)


def _rows(x: Float[Array, "B S _ E"], index: Int[Array, "B N"]) -> Float[Array, "B N _ E"]:
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)
