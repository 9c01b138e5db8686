"""All-gather attention: every rank collects all keys and values, then computes its own rows.

The one collective stands before the compute, exposed, and every rank holds the whole sequence's
keys: cheap under grouped heads and for short shards, where a ring's hops are too small. The
gathered keys are put in position order, so that a query's keys are one interval in every layout.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longctx.parallel.shards import Shards, pack, unpack
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import block_backward, block_forward, row_delta

type Output = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]


def gather_attention(
    shards: Shards,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    doc_start: Int[Array, "B T"] | None,
) -> Output:
    """Output and lse of this rank's queries over all ranks' keys; differentiable in q, k, v.

    dk and dv are summed over the ranks in float32 (the transpose of a gather sums in bfloat16).
    k and v may be `copied_heads`.
    """
    args = q, k, v, doc_start
    return _gather(shards, *unify_varying(args, varying_axes(*args) | {shards.axis}))


def _all_keys(shards: Shards, k: Array, v: Array) -> tuple[Array, Array]:
    gathered = lax.all_gather(pack(k, v), shards.axis)
    return unpack(shards.layout.in_position_order(gathered), k.shape[-1])


def _mask(shards: Shards, batch: int, doc_start: Array | None) -> dict[str, Any]:
    if not shards.causal:
        return {}
    lo, hi = shards.seen_positions(batch, doc_start)
    return {"lo": lo, "hi": hi}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None) -> Output:
    return _gather_fwd(shards, q, k, v, doc_start)[0]


def _gather_fwd(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None):
    like, k, v = jnp.zeros((), k.dtype), k.astype(q.dtype), v.astype(q.dtype)
    mask = _mask(shards, q.shape[0], doc_start)
    keys = _all_keys(shards, k, v)
    o, lse = block_forward(q, *keys, out_dtype=q.dtype, **mask, **shards.options)
    return (o, lse), (q, k, v, like, doc_start, o, lse)


def _gather_bwd(shards: Shards, saved: tuple, cotangents: Output):
    q, k, v, like, doc_start, o, lse = saved
    do, dlse = cotangents
    delta = row_delta(o, lse, do, dlse)
    all_k, all_v = _all_keys(shards, k, v)
    mask = _mask(shards, q.shape[0], doc_start)
    dq, dk, dv = block_backward(
        q, all_k, all_v, do, lse, delta, out_dtype=lse.dtype, **mask, **shards.options
    )
    dkv = shards.layout.in_shards(pack(dk, dv), shards.ranks)
    dk, dv = unpack(lax.psum_scatter(dkv, shards.axis), k.shape[-1])
    return dq.astype(q.dtype), dk.astype(like.dtype), dv.astype(like.dtype), None


_gather.defvjp(_gather_fwd, _gather_bwd)
