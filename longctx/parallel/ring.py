"""Ring attention: every rank keeps its queries while keys and values travel around the ring.

    forward, rank r, hop t = 0 .. n-1, keys of rank r - t:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3 ─ ...          one packed buffer, next rank
        compute   block 0      block 1      block 2  ...        (o, lse) carried in float32

    backward, after the same moves of keys and values:

        move      kv 1 ─────▶  kv 2 ─────▶  kv 3 ─▶    d 2 ──▶     d n-1 ▶ home
        compute   half of 0    block 1      block 2    block 3 ... other half of 0
                                            d 1 ───▶

The gradients `d` of a block of keys follow it one hop behind: while a block is computed, the
sum that the previous rank has finished is on its way. The rank's own block is computed in two
halves (of the heads), of which the first hides the first move of keys and the second the last
move of gradients; its own dk and dv never travel. `optimization_barrier` ties each arrival to
the end of the compute that hides it, else XLA starts all moves at once and keeps all shards.

Sources: arXiv 2310.01889 (ring), 2307.08691 (block gradients from the global lse).
"""

import functools
from typing import NamedTuple

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
    batch, width = q.shape[0], k.shape[-1]
    kv, carry = pack(k, v), None
    for hop in range(shards.hops):
        more = hop + 1 < shards.hops
        arriving = lax.ppermute(kv, shards.axis, shards.shift(1)) if more else None
        if hop == 0:
            mask = shards.own_block(batch, doc_start)
        else:
            mask = shards.block(hop, batch, doc_start)
            k, v = unpack(kv, width)
        carry = block_forward(q, k, v, carry=carry, **mask, **shards.options)
        if more:
            kv, carry = lax.optimization_barrier((arriving, carry))
    o, lse = carry
    return o.astype(q.dtype), lse


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

    def half(part: _Half, k: Array, v: Array) -> tuple[Array, Array, Array]:
        keys = k[:, :, part.keys], v[:, :, part.keys]
        return _gradients(shards, rows.heads(part.queries), *keys, own, None)

    first, second = _halves(q.shape[2], k.shape[2])
    if shards.hops == 1:
        dq, dk, dv = _gradients(shards, rows, k, v, own, None)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    arriving = lax.ppermute(pack(k, v), shards.axis, shards.shift(1))
    kv, local = lax.optimization_barrier((arriving, half(first, k, v)))
    dq = total = None
    for hop in range(1, shards.hops):
        more = hop + 1 < shards.hops
        arriving = lax.ppermute(kv, shards.axis, shards.shift(1)) if more else None
        moved = None if total is None else lax.ppermute(total, shards.axis, shards.shift(1))
        mask = shards.block(hop, batch, doc_start)
        dq, dk, dv = _gradients(shards, rows, *unpack(kv, width), mask, dq)
        total = pack(dk, dv) if moved is None else moved + pack(dk, dv)
        kv, dq, total = lax.optimization_barrier((arriving, dq, total))
    total, k, v = lax.optimization_barrier((total, k, v))  # the second half waits for the move
    home = lax.ppermute(total, shards.axis, shards.shift(1 - shards.hops))
    halves = [local] if second is None else [local, half(second, k, v)]
    dq_own, dk_own, dv_own = (jnp.concatenate(x, 2) for x in zip(*halves, strict=True))
    if dk_own.shape[2] != k.shape[2]:  # one key head, which both halves have used
        dk_own, dv_own = (jnp.sum(x, 2, keepdims=True) for x in (dk_own, dv_own))
    dk, dv = unpack(home, width)
    return (
        (dq + dq_own).astype(q.dtype),
        (dk + dk_own).astype(k.dtype),
        (dv + dv_own).astype(v.dtype),
        None,
    )


_ring.defvjp(_ring_fwd, _ring_bwd)


class _Rows(NamedTuple):
    """All that the backward of a block needs to know of the queries."""

    q: Float[Array, "B T H D"]
    do: Float[Array, "B T H E"]
    lse: Float[Array, "B H T"]
    delta: Float[Array, "B H T"]

    def heads(self, heads: slice) -> "_Rows":
        return _Rows(*(x[:, :, heads] for x in self[:2]), *(x[:, heads] for x in self[2:]))


class _Half(NamedTuple):
    """A part of the heads: a slice of the queries' and the slice of the keys' that it uses."""

    queries: slice
    keys: slice


def _halves(heads: int, kv_heads: int) -> tuple[_Half, _Half | None]:
    """Two parts that share no key head, if there are two; one part if there is one head."""
    if heads == 1:
        return _Half(slice(None), slice(None)), None
    if kv_heads == 1:
        middle, both = heads // 2, slice(None)
        return _Half(slice(middle), both), _Half(slice(middle, None), both)
    keys = kv_heads // 2
    queries = keys * (heads // kv_heads)
    return _Half(slice(queries), slice(keys)), _Half(slice(queries, None), slice(keys, None))


def _gradients(
    shards: Shards, rows: _Rows, k: Array, v: Array, mask: dict, dq: Array | None
) -> tuple[Array, Array, Array]:
    """What a block of keys adds to dq, and its dk and dv, all in float32."""
    wide = rows.lse.dtype
    zeros = (jnp.zeros(x.shape, wide) for x in (rows.q, k, v))
    dq_zero, *dkv_zero = zeros
    accumulate = (dq_zero if dq is None else dq, *dkv_zero)
    return block_backward(
        rows.q, k, v, rows.do, rows.lse, rows.delta,
        accumulate=accumulate, **mask, **shards.options,
    )  # fmt: skip
