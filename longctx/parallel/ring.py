"""Ring attention: every rank keeps its queries while keys and values travel around the ring.

    forward, rank r, hop t = 0 .. n-1, keys of rank r - t:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3 ─ ...          to the next rank
        compute   block 0,     block 1      block 2  ...        (o, lse) carried in float32
                  late rows    and 0, early rows

    backward, n = 5, d the gradients of a block's keys and values:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3, d 1 ─▶ kv 4, d 2 ─▶ d 3 ───────▶ d 4 ──▶ home
        compute   half of 0    block 1      block 2      block 3      block 4      half of 0

In a forward on GPUs the early half of a rank's rows waits with its own keys for those of the first
hop, and meets both at once, in the order of their positions: nothing of theirs is carried, all
ranks have as many tiles to begin, and short ones come last. The late half hides the first move.

The gradients of a block of keys follow it one hop behind: while a block is computed, the sum
that the previous rank has finished is on its way, with the next keys. The rank's own block is
computed in two halves (of the keys), of which the first hides the first move of keys and the
second the last move of gradients; its own dk and dv never travel. All blocks add to one dq in
place. `optimization_barrier` ties each arrival to the end of the compute that hides it, else XLA
starts all moves at once and keeps all shards.

The arrays of a hop travel as they are. By default XLA lets one of a GPU's collectives run at a
time, so that one array hides behind a block: with `longctx.compiler.training_options` all do.

The backward's buffers, mostly sums in float32, take several times the memory of a shard of q, k
and v. With `head_groups` as many rings run one after another, each over some heads with smaller
buffers, and write their gradients over the q, k and v of their heads.

Sources: arXiv 2310.01889 (ring), 2307.08691 (block gradients from the global lse).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longctx.parallel.shards import Shards
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import (
    Pieces,
    block_backward,
    block_forward,
    flash_attention,
    row_delta,
)

type Output = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]
type Pair = tuple[Array, Array]  # keys and values


def ring_attention(
    shards: Shards,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    doc_start: Int[Array, "B T"] | None,
) -> Output:
    """Output and lse of this rank's queries over all ranks' keys; differentiable in q, k, v.

    k and v may be `ulysses.copied_heads`.
    """
    args = q, k, v, doc_start
    q, k, v, doc_start = unify_varying(args, varying_axes(*args) | {shards.axis})
    if shards.hops > 1:
        return _ring(shards, q, k, v, doc_start)
    mask = dict[str, Any](causal=False) | shards.own_block(q.shape[0], doc_start)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    o, lse = flash_attention(q, k, v, return_lse=True, **mask, **shards.options)
    return o, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None) -> Output:
    return _ring_fwd(shards, q, k, v, doc_start)[0]


def _ring_fwd(shards: Shards, q: Array, k: Array, v: Array, doc_start: Array | None):
    like, (batch, length, heads, _) = jnp.zeros((), k.dtype), q.shape
    kv = k.astype(q.dtype), v.astype(q.dtype)
    # Tied to this call, else XLA keeps one copy of the zeros over all layers' calls.
    zero, q = lax.optimization_barrier((jnp.zeros((), q.dtype), q))
    o = jnp.full((batch, length, heads, v.shape[-1]), zero)
    lse = jnp.full((batch, heads, length), zero, jnp.promote_types(q.dtype, jnp.float32))
    o, lse = _by_groups(
        shards.head_groups,
        functools.partial(_forward, shards, doc_start),
        unify_varying((o, lse), varying_axes(q)), q, kv,
    )  # fmt: skip
    return (o, lse), (q, kv, like, doc_start, o, lse)


def _ring_bwd(shards: Shards, saved: tuple, cotangents: Output):
    q, kv, like, doc_start, o, lse = saved
    # Gradients take the place of what they are of, which nothing needs after them.
    dq, dkv = _by_groups(
        shards.head_groups,
        functools.partial(_backward, shards, doc_start),
        (q, jax.tree.map(lambda x: x.astype(like.dtype), kv)), o, lse, *cotangents,
    )  # fmt: skip
    return dq, *dkv, None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _by_groups[Tree](groups: int, function: Callable[..., Tree], into: Tree, *others: Any) -> Tree:
    """`function(into, *others)` for one group of heads after another; it overwrites `into`.

    Every array has its heads along the last axis but one.
    """
    if groups == 1:
        return function(into, *others)

    def take(x: Array, group: Array) -> Array:
        size = x.shape[-2] // groups
        return lax.dynamic_slice_in_dim(x, group * size, size, axis=x.ndim - 2)

    def put(x: Array, part: Array, group: Array) -> Array:
        start = group * part.shape[-2]
        return lax.dynamic_update_slice_in_dim(x, part, start, axis=x.ndim - 2)

    def step(group: Array, into: Tree) -> Tree:
        parts = jax.tree.map(lambda x: take(x, group), (into, *others))
        return jax.tree.map(lambda x, part: put(x, part, group), into, function(*parts))

    return lax.fori_loop(0, groups, step, into)


def _forward(shards: Shards, doc_start: Array | None, _: Output, q: Array, kv: Pair) -> Output:
    batch, group = q.shape[0], q.shape[2] // kv[0].shape[2]
    early_rows = first_row = shards.early_rows(group, max(x.shape[3] for x in kv))
    attend = functools.partial(block_forward, q, **shards.options)
    own = keys = kv
    mask, carry = shards.own_block(batch, doc_start), None
    mask = {name: x[:, first_row:] if name in ("lo", "hi") else x for name, x in mask.items()}
    for hop in range(1, shards.hops):
        arriving = _move(shards, kv)
        carry = attend(*keys, first_row=first_row, carry=carry, **mask)
        if first_row:
            order, mask = shards.joint_block(batch, doc_start, early_rows)
        else:
            order, mask = None, shards.block(hop, batch, doc_start)
        # The small mask at one moment too: scattered among shards it leaves holes in memory.
        kv, carry, order, mask = lax.optimization_barrier((arriving, carry, order, mask))
        keys = kv if order is None else [Pieces(pair, order) for pair in zip(own, kv, strict=True)]
        first_row = 0
    return attend(*keys, carry=carry, out_dtype=q.dtype, **mask)


def _backward(
    shards: Shards,
    doc_start: Array | None,
    operands: tuple[Array, Pair],
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
) -> tuple[Array, Pair]:
    """The gradients of the operands: of q, and of k and v."""
    q, given = operands
    own, batch = jax.tree.map(lambda x: x.astype(q.dtype), given), q.shape[0]
    # Else XLA may keep what arrived in the forward for the backward: a second shard of keys.
    own, do, lse = lax.optimization_barrier((own, do, lse))
    delta = row_delta(o, lse, do, dlse)
    gradients = functools.partial(_gradients, shards, (q, do, lse, delta))
    local, middle = shards.own_block(batch, doc_start), shards.local // 2

    arriving = _move(shards, own)
    # Later keys first: few rows see them, and keys are a smaller message than their gradients.
    dq, late = gradients(None, own, local, slice(middle, None))
    kv, dq, late = lax.optimization_barrier((arriving, dq, late))
    total = None
    for hop in range(1, shards.hops):
        arriving = _move(shards, (kv if hop + 1 < shards.hops else None, total))
        dq, dkv = gradients(dq, kv, shards.block(hop, batch, doc_start))
        (kv, moved), dq, dkv = lax.optimization_barrier((arriving, dq, dkv))
        total = dkv if moved is None else jax.tree.map(jnp.add, moved, dkv)
        # Else what was summed may stay in memory while the next block is computed.
        dq, kv, total = lax.optimization_barrier((dq, kv, total))
    total, own = lax.optimization_barrier((total, own))  # the early keys wait for the move
    home = _move(shards, total, 1 - shards.hops)
    parts = [late]
    if middle:
        dq, early = gradients(dq, own, local, slice(middle))
        parts.insert(0, early)
    dkv = (
        (arrived + jnp.concatenate(here, 1)).astype(x.dtype)
        for x, arrived, *here in zip(given, home, *parts, strict=True)
    )
    return dq.astype(q.dtype), tuple(dkv)


def _move[Tree](shards: Shards, arrays: Tree, hops: int = 1) -> Tree:
    """What the rank so many hops before sends of `arrays`."""
    return jax.tree.map(lambda x: lax.ppermute(x, shards.axis, shards.shift(hops)), arrays)


def _gradients(
    shards: Shards,
    rows: tuple[Array, Array, Array, Array],
    dq: Array | None,
    kv: Pair,
    mask: dict[str, Any],
    keys: slice = slice(None),
) -> tuple[Array, Array | Pair]:
    """`dq` and what some keys of a block add to it, and their dk and dv; in float32.

    `rows` is all that the backward needs to know of the queries: (q, do, lse, delta).
    """
    q, do, lse, delta = rows
    k, v = (x[:, keys] for x in kv)
    start = keys.start or 0
    mask = {name: x - start if name in ("lo", "hi") else x for name, x in mask.items()}
    dq, dk, dv = block_backward(
        q, k, v, do, lse, delta, accumulate=(dq, None, None), q_offset=-start,
        out_dtype=lse.dtype, **mask, **shards.options,
    )  # fmt: skip
    # Kernels write gradients of one shape behind each other: they travel as they are.
    return dq, jnp.stack([dk, dv]) if dk.shape == dv.shape else (dk, dv)
