"""Ulysses and USP: devices swap tokens for heads, compute, and swap back.

    [B, T/(RU), H] ── all-to-all in groups of U ──▶ [B, T/R, H/U] ── attention ──▶ back

With one rank (R = 1) a device then holds whole sequences of some heads (Ulysses); with more, a
ring runs between ranks (USP). Keys and values are repeated when U devices share fewer heads.

Sources: arXiv 2309.14509 (Ulysses), 2405.07719 (USP).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longctx.parallel.ring import Output, ring_attention
from longctx.parallel.shards import Shards
from pallas_kernels.flash_attention import block_backward, flash_attention, row_delta


def kv_copies(heads: int, kv_heads: int, inner: int) -> int:
    """Copies of each key/value head that `inner` devices need between them.

    Raises:
      ValueError: the heads cannot be dealt out evenly.
    """
    dealt = math.lcm(kv_heads, inner)
    if heads % dealt:
        raise ValueError(
            f"{heads} query and {kv_heads} key/value heads cannot be dealt to {inner} devices: "
            f"query heads must be a multiple of {dealt}"
        )
    return dealt // kv_heads


def ulysses_attention(
    shards: Shards,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    doc_start: Int[Array, "B T"] | None,
) -> Output:
    """Output and lse of this device's queries over all keys; differentiable in q, k, v."""

    def swap(x: Array, split: int, concat: int) -> Array:
        groups = shards.groups()
        return lax.all_to_all(x, shards.axis, split, concat, tiled=True, axis_index_groups=groups)

    attend = whole_attention if shards.ranks == 1 else ring_attention
    k, v = copied_heads(k, v, kv_copies(q.shape[2], k.shape[2], shards.inner))
    q, k, v = (swap(x, 2, 1) for x in (q, k, v))
    if doc_start is not None:
        doc_start = lax.all_gather(
            doc_start, shards.axis, axis=1, tiled=True, axis_index_groups=shards.groups()
        )
    o, lse = attend(shards, q, k, v, doc_start)
    return swap(o, 1, 2), swap(lse, 2, 1)


def whole_attention(
    shards: Shards,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    doc_start: Int[Array, "B T"] | None,
) -> Output:
    """Output and lse where one device holds the whole sequence."""
    if k.dtype != q.dtype:
        return _whole_attention(shards, q, k, v, doc_start)
    o, lse = flash_attention(
        q, k, v,
        causal=shards.causal, window=shards.window, lo=doc_start, return_lse=True,
        **shards.options,
    )  # fmt: skip
    return o, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole_attention(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None):
    """`whole_attention` of `copied_heads`."""
    return whole_attention(shards, q, k.astype(q.dtype), v.astype(q.dtype), doc_start)


def _whole_forward(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None):
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    o, lse = whole_attention(shards, q, k, v, doc_start)
    return (o, lse), (q, k, v, doc_start, o, lse)


def _whole_backward(shards: Shards, saved: tuple, cotangents: Output):
    q, k, v, doc_start, o, lse = saved
    do, dlse = cotangents
    delta = row_delta(o, lse, do, dlse)
    dq, dk, dv = block_backward(
        q, k, v, do, lse, delta, out_dtype=lse.dtype,
        causal=shards.causal, window=shards.window, lo=doc_start, **shards.options,
    )  # fmt: skip
    return dq.astype(q.dtype), dk, dv, None


_whole_attention.defvjp(_whole_forward, _whole_backward)


def copied_heads(
    k: Float[Array, "B T _ D"], v: Float[Array, "B T _ E"], copies: int
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]]:
    """Every key/value head `copies` times: in float32 if that is more than once.

    Strategies round them to q's dtype and give gradients in float32, so that those of the copies
    are rounded when they have been added up.
    """
    if copies == 1:
        return k, v
    wide = jnp.promote_types(k.dtype, jnp.float32)
    k, v = (repeat_heads(x.astype(wide), copies * x.shape[2]) for x in (k, v))
    return k, v


def repeat_heads(x: Float[Array, "B T _ D"], heads: int) -> Float[Array, "B T H D"]:
    """Every key/value head once for each query head that reads it; gradients add in float32."""
    if x.shape[2] == heads:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.repeat(wide, heads // x.shape[2], axis=2).astype(x.dtype)
