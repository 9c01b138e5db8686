"""Sparse attention over a cache: a query sees the cached keys that carry its own code.

What `sparse.py` computes with intervals, by a mask over all slots: for decoding, with no claim of
speed. Hash buckets are codes; for dropping, kept rows carry 0, dropped queries and keys codes
that nothing else carries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ROWS = 64  # queries whose scores over all slots are held at once
DROPPED_QUERY, DROPPED_KEY = 2, 1


def drop_codes(keep: Bool[Array, "B T H"], dropped: int) -> Int[Array, "B T H"]:
    """0 for a kept row, `dropped` (one of the two constants) for another."""
    return jnp.where(keep, 0, dropped)


def coded_cache_attention(
    q: Float[Array, "B T H D"],
    keys: Float[Array, "B S H D"],
    values: Float[Array, "B S H E"],
    q_codes: Int[Array, "B T H"],
    k_codes: Int[Array, "B S H"],
    start: Int[Array, "B"],
    *,
    strict: bool,
    scale: float | None = None,
) -> Float[Array, "B T H E"]:
    """Attention of the queries at positions start[b] + t to the slots of their code.

    Slot s holds position s; a query sees s < start[b] + t, and s = start[b] + t unless `strict`.
    Without such a slot it gives 0. Scores and softmax in float32, or float64 for such queries.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, length = q.shape[:2]
    rows = min(ROWS, length)
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None, None]
    k_codes = k_codes.transpose(0, 2, 1)[:, :, None]
    stop = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None] + (0 if strict else 1)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % rows)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, -1, rows, *x.shape[2:]).swapaxes(0, 1)

    def some(part: tuple[Array, Array, Array]) -> Float[Array, "B R H E"]:
        q, codes, stop = part
        same = codes.transpose(0, 2, 1)[..., None] == k_codes
        seen = same & (slots < stop[:, None, :, None])
        product = jnp.einsum(
            "brhd,bshd->bhrs", q, keys, precision="highest", preferred_element_type=wide
        )
        s = scale * product
        p = jnp.where(seen, jax.nn.softmax(s, axis=-1, where=seen), 0.0)
        return jnp.einsum("bhrs,bshe->brhe", p.astype(values.dtype), values)

    o = jax.lax.map(some, (split(q), split(q_codes), split(stop)))
    return o.swapaxes(0, 1).reshape(batch, -1, *o.shape[3:])[:, :length]
