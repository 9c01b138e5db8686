"""Ring attention: every rank keeps its queries while keys and values travel around the ring.

    forward, rank r, hop t = 0 .. n-1, keys of rank r - t:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3 ─ ...          one packed buffer, next rank
        compute   block 0      block 1      block 2  ...        (o, lse) carried in float32

    backward, n = 5, d the gradients of a block's keys and values:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3, d 1 ─▶ kv 4, d 2 ─▶ d 3 ───────▶ d 4 ──▶ home
        compute   half of 0    block 1      block 2      block 3      block 4      half of 0

The gradients of a block of keys follow it one hop behind: while a block is computed, the sum
that the previous rank has finished is on its way, in one message with the next keys. The rank's
own block is computed in two halves (of the heads), of which the first hides the first move of
keys and the second the last move of gradients; its own dk and dv never travel.
`optimization_barrier` ties each arrival to the end of the compute that hides it, else XLA starts
all moves at once and keeps all shards.

Sources: arXiv 2310.01889 (ring), 2307.08691 (block gradients from the global lse).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longctx.parallel.shards import Shards, pack, unpack
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import block_backward, block_forward

type Output = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]


def ring_attention(
    shards: Shards,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    doc_start: Int[Array, "B T"] | None,
) -> Output:
    """Output and lse of this rank's queries over all ranks' keys; differentiable in q, k, v."""
    args = q, k, v, doc_start
    return _ring(shards, *unify_varying(args, varying_axes(*args) | {shards.axis}))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None) -> Output:
    batch, width, last = q.shape[0], k.shape[-1], shards.hops - 1
    kv = pack(k, v)
    arriving = lax.ppermute(kv, shards.axis, shards.shift(1)) if last else None
    mask, carry = shards.own_block(batch, doc_start), None
    for hop in range(last):
        carry = block_forward(q, k, v, carry=carry, **mask, **shards.options)
        kv, carry = lax.optimization_barrier((arriving, carry))
        arriving = lax.ppermute(kv, shards.axis, shards.shift(1)) if hop + 1 < last else None
        k, v = unpack(kv, width)
        mask = shards.block(hop + 1, batch, doc_start)
    return block_forward(q, k, v, carry=carry, out_dtype=q.dtype, **mask, **shards.options)


def _ring_fwd(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None):
    o, lse = _ring(shards, q, k, v, doc_start)
    return (o, lse), (q, k, v, doc_start, o, lse)


def _ring_bwd(shards: Shards, saved: tuple, cotangents: Output):
    q, k, v, doc_start, o, lse = saved
    do, dlse = cotangents
    batch, width = q.shape[0], k.shape[-1]
    # Else XLA may keep what arrived in the forward for the backward: a second shard of keys.
    k, v, do, lse = lax.optimization_barrier((k, v, do, lse))
    delta = jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), -1).swapaxes(1, 2) - dlse
    rows = _Rows(q, do, lse, delta)
    own = shards.own_block(batch, doc_start)
    if shards.hops == 1:
        dq, dk, dv = _gradients(shards, rows, k, v, own)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    def part(heads: _Heads, k: Array, v: Array) -> tuple[Array, Array, Array]:
        keys = k[:, :, heads.keys], v[:, :, heads.keys]
        return _gradients(shards, rows.of(heads.queries), *keys, own)

    first, *second = _halves(q.shape[2], k.shape[2])
    arriving = lax.ppermute(pack(k, v), shards.axis, shards.shift(1))
    kv, *local = lax.optimization_barrier((arriving, part(first, k, v)))
    dq, total = jnp.zeros(q.shape, lse.dtype), None
    for hop in range(1, shards.hops):
        leaving = _join(kv if hop + 1 < shards.hops else None, total)
        arriving = None if leaving is None else lax.ppermute(leaving, shards.axis, shards.shift(1))
        mask = shards.block(hop, batch, doc_start)
        dq_block, *dkv = _gradients(shards, rows, *unpack(kv, width), mask)
        # The message as it arrives: its parts could be taken out before the block is computed.
        arriving, dq, dkv = lax.optimization_barrier((arriving, dq + dq_block, pack(*dkv)))
        kv, moved = _split(arriving, kv, total)
        total = dkv if moved is None else moved + dkv
    total, k, v = lax.optimization_barrier((total, k, v))  # the second half waits for the move
    home = lax.ppermute(total, shards.axis, shards.shift(1 - shards.hops))
    local += [part(heads, k, v) for heads in second]
    dq_own, dk_own, dv_own = (jnp.concatenate(x, 2) for x in zip(*local, strict=True))
    if dk_own.shape[2] != k.shape[2]:  # one key head, which both halves have used
        dk_own, dv_own = (jnp.sum(x, 2, keepdims=True) for x in (dk_own, dv_own))
    dk, dv = unpack(home, width)
    dq, dk, dv = dq + dq_own, dk + dk_own, dv + dv_own
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_fwd, _ring_bwd)


class _Rows(NamedTuple):
    """All that the backward of a block needs to know of the queries."""

    q: Float[Array, "B T H D"]
    do: Float[Array, "B T H E"]
    lse: Float[Array, "B H T"]
    delta: Float[Array, "B H T"]

    def of(self, heads: slice) -> "_Rows":
        return _Rows(*(x[:, :, heads] for x in self[:2]), *(x[:, heads] for x in self[2:]))


class _Heads(NamedTuple):
    """Some of the heads: a slice of the queries' and the slice of the keys' that they use."""

    queries: slice
    keys: slice


def _halves(heads: int, kv_heads: int) -> list[_Heads]:
    """All heads in two parts that share no key head, if there are two; one part if one head."""
    if heads == 1:
        return [_Heads(slice(None), slice(None))]
    if kv_heads == 1:
        middle, both = heads // 2, slice(None)
        return [_Heads(slice(middle), both), _Heads(slice(middle, None), both)]
    keys = kv_heads // 2
    queries = keys * (heads // kv_heads)
    return [_Heads(slice(queries), slice(keys)), _Heads(slice(queries, None), slice(keys, None))]


def _gradients(
    shards: Shards, rows: _Rows, k: Array, v: Array, mask: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """What a block of keys adds to dq, and its dk and dv, in float32."""
    return block_backward(
        rows.q, k, v, rows.do, rows.lse, rows.delta,
        out_dtype=rows.lse.dtype, **mask, **shards.options,
    )  # fmt: skip


def _join(kv: Array | None, sums: Array | None) -> Array | None:
    """Keys and values, and the sums of their gradients, as one message; None of nothing.

    A GPU hides one message at a time behind a kernel; a second one would wait for it.
    """
    if kv is None or sums is None:
        return sums if kv is None else kv
    words = _words(kv)
    return pack(words, lax.bitcast_convert_type(sums, words.dtype))


def _split(message: Array | None, kv: Array, sums: Array | None) -> tuple[Array, Array | None]:
    """The parts of a message from `_join`, or `kv` and None where there is no such part.

    They are like `kv` and `sums`, which this rank has sent.
    """
    if message is None or sums is None:
        return kv if message is None else message, None
    if message.shape == sums.shape:
        return kv, message
    words, moved = unpack(message, message.shape[-1] - sums.shape[-1])
    return _from_words(words, kv.dtype, kv.shape[-1]), lax.bitcast_convert_type(moved, sums.dtype)


def _words(x: Array) -> Array:
    """The bits of x as unsigned integers as wide as sums are: two 16-bit numbers to a word."""
    if x.dtype.itemsize > 2:
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    high, low = jnp.split(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, -1)
    return high << 16 | low


def _from_words(words: Array, dtype: jnp.dtype, width: int) -> Array:
    """The inverse of `_words`, for numbers of `dtype` and `width` of them."""
    if dtype.itemsize > 2:
        return lax.bitcast_convert_type(words, dtype)
    x = pack(words >> 16, words & 0xFFFF).astype(jnp.uint16)
    return lax.bitcast_convert_type(x, dtype)[..., :width]
