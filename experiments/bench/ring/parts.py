"""Parts of a program over devices: what else it does is left out, and stands in for itself."""

import functools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longctx.parallel import context, ring
from longctx.parallel.shards import Shards
from pallas_kernels._pallas import unify_varying, varying_axes

COMPUTE, COMMUNICATION, ALONE = "compute", "communication", "alone"


def only(part: str, devices: int) -> ExitStack:
    """While it is open, programs over so many devices become their `part`.

    COMPUTE is the ring with its moves left out, COMMUNICATION the ring with its blocks left out.
    ALONE is what one of the devices does with its shard, by any strategy and for one device: what
    others would send is made of what it has, by a copy where it is not a ring's. Everything that
    is left out hands on its inputs, so that the rest happens in the same order.
    """
    stack = ExitStack()

    def patch(where: Any, **stand_ins: Any) -> None:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(where, name, stand_in))

    if part in (COMPUTE, ALONE):
        patch(lax, ppermute=_stay)
    if part == COMMUNICATION:
        patch(ring, block_forward=_forward, block_backward=_backward)
    if part == ALONE:
        # In the middle of a ring: of its hops one half sees early keys, the other is seen late.
        device = devices // 2
        patch(Shards, rank=lambda shards: _stay(jnp.int32(device // shards.inner)))
        patch(context, sequence_axis=lambda _: (devices, True))
        patch(
            lax,
            all_gather=lambda x, _: jnp.broadcast_to(_stay(x), (devices, *x.shape)),
            psum_scatter=lambda x, _: _stay(x)[device],
            all_to_all=functools.partial(_swap, devices),
        )
    return stack


def _stay(x: Any, *_: Any) -> Any:
    return lax.optimization_barrier(x)


def _swap(devices: int, x: Array, _: str, split: int, concat: int, **how: Any) -> Array:
    groups = how["axis_index_groups"]
    among = devices if groups is None else len(groups[0])
    return jnp.concatenate(jnp.split(_stay(x), among, split), concat)


def _after(x: Array, *others: Array) -> Array:
    """`x`, which the compiler believes to depend on the others, so that they arrive."""
    probe = jnp.stack([y[(0,) * y.ndim].astype(jnp.float32) for y in others]).sum()
    return x + (0 * probe).astype(x.dtype)


def _forward(q: Array, k: Any, v: Any, *, out_dtype: Any = None, **how: Any) -> Any:
    (batch, length, heads, _), width = q.shape, jax.tree.leaves(v)[0].shape[3]
    length -= how.get("first_row", 0)
    o, lse = how.get("carry") or (None, None)
    if o is None or o.shape[1] < length:
        o = jnp.zeros((batch, length, heads, width), jnp.float32)
        lse = jnp.zeros((batch, heads, length), jnp.float32)
    o, lse = unify_varying((o.astype(out_dtype or o.dtype), lse), varying_axes(q))
    return _after(o, *jax.tree.leaves((k, v))), lse


def _backward(q: Array, k: Array, v: Array, *rows: Array, **_: Any) -> Any:
    gradients = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    gradients = unify_varying(gradients, varying_axes(q))
    return tuple(_after(x, k, v, *rows) for x in gradients)
