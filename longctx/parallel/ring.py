"""Ring attention: every rank keeps its queries while keys and values travel around the ring.

    forward, rank r, hop t = 0 .. n-1, keys of rank r - t:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3 ─ ...          one packed buffer, next rank
        compute   block 0      block 1      block 2  ...        (o, lse) carried in float32

    backward, n = 5, d the gradients of a block's keys and values:

        move      kv 1 ──────▶ kv 2 ──────▶ kv 3, d 1 ─▶ kv 4, d 2 ─▶ d 3 ───────▶ d 4 ──▶ home
        compute   half of 0    block 1      block 2      block 3      block 4      half of 0

The gradients of a block of keys follow it one hop behind: while a block is computed, the sum
that the previous rank has finished is on its way, in one message with the next keys. The rank's
own block is computed in two halves (of the keys), of which the first hides the first move of
keys and the second the last move of gradients; its own dk and dv never travel. All blocks add to
one dq in place.
`optimization_barrier` ties each arrival to the end of the compute that hides it, else XLA starts
all moves at once and keeps all shards.

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

from longctx.parallel.shards import Shards, pack, unpack
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import block_backward, block_forward, flash_attention, row_delta

type Output = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]


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
    if k.shape[2] % shards.head_groups:
        raise ValueError(f"head_groups={shards.head_groups} must divide {k.shape[2]} key heads")
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
    like, (batch, length, heads, width) = jnp.zeros((), k.dtype), q.shape
    kv = _pair(k.astype(q.dtype), v.astype(q.dtype))
    # Tied to this call, else XLA keeps one copy of the zeros over all layers' calls.
    zero, q = lax.optimization_barrier((jnp.zeros((), q.dtype), q))
    o = jnp.full((batch, length, heads, v.shape[-1]), zero)
    lse = jnp.full((batch, heads, length), zero, jnp.promote_types(q.dtype, jnp.float32))
    o, lse = _by_groups(
        shards.head_groups,
        functools.partial(_forward, shards, doc_start, width),
        unify_varying((o, lse), varying_axes(q)), q, kv,
    )  # fmt: skip
    return (o, lse), (q, kv, like, doc_start, o, lse)


def _ring_bwd(shards: Shards, saved: tuple, cotangents: Output):
    q, kv, like, doc_start, o, lse = saved
    # Gradients take the place of what they are of, which nothing needs after them.
    dq, dkv = _by_groups(
        shards.head_groups,
        functools.partial(_backward, shards, doc_start),
        (q, kv.astype(like.dtype)), o, lse, *cotangents,
    )  # fmt: skip
    return dq, *_unpair(dkv, q.shape[-1]), None


_ring.defvjp(_ring_fwd, _ring_bwd)


def _by_groups[Tree](
    groups: int, function: Callable[..., Tree], into: Tree, *others: Array
) -> Tree:
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


def _forward(
    shards: Shards, doc_start: Array | None, width: int, _: Output, q: Array, kv: Array
) -> Output:
    batch, mask, carry = q.shape[0], shards.own_block(q.shape[0], doc_start), None
    for hop in range(1, shards.hops):
        arriving = lax.ppermute(kv, shards.axis, shards.shift(1))
        carry = block_forward(q, *_unpair(kv, width), carry=carry, **mask, **shards.options)
        # The small mask at one moment too: scattered among shards it leaves holes in memory.
        mask = shards.block(hop, batch, doc_start)
        kv, carry, mask = lax.optimization_barrier((arriving, carry, mask))
    return block_forward(
        q, *_unpair(kv, width), carry=carry, out_dtype=q.dtype, **mask, **shards.options
    )


def _backward(
    shards: Shards,
    doc_start: Array | None,
    queries_and_keys: tuple[Array, Array],
    o: Array,
    lse: Array,
    do: Array,
    dlse: Array,
) -> tuple[Array, Array]:
    """The gradients of q and of k and v, paired as they are in `queries_and_keys`."""
    q, given = queries_and_keys
    own, batch, width = given.astype(q.dtype), q.shape[0], q.shape[-1]
    # Else XLA may keep what arrived in the forward for the backward: a second shard of keys.
    own, do, lse = lax.optimization_barrier((own, do, lse))
    delta = row_delta(o, lse, do, dlse)
    gradients = functools.partial(_gradients, shards, (q, do, lse, delta), width)
    local, middle = shards.own_block(batch, doc_start), shards.local // 2

    arriving = lax.ppermute(own, shards.axis, shards.shift(1))
    # Later keys first: few rows see them, and keys are a smaller message than their gradients.
    dq, late = gradients(None, own, local, slice(middle, None))
    kv, dq, late = lax.optimization_barrier((arriving, dq, late))
    message = total = None
    for hop in range(1, shards.hops):
        leaving = _join(kv if hop + 1 < shards.hops else None, total, message)
        arriving = None if leaving is None else lax.ppermute(leaving, shards.axis, shards.shift(1))
        dq, dkv = gradients(dq, kv, shards.block(hop, batch, doc_start))
        # The message as it arrives: its parts could be taken out before the block is computed.
        message, dq, dkv = lax.optimization_barrier((arriving, dq, dkv))
        kv, moved, message = _split(message, kv, total)
        total = dkv if moved is None else moved + dkv
    total, own = lax.optimization_barrier((total, own))  # the early keys wait for the move
    home = lax.ppermute(total, shards.axis, shards.shift(1 - shards.hops))
    parts = [_unpair(late, width)]
    if middle:
        dq, early = gradients(dq, own, local, slice(middle))
        parts.insert(0, _unpair(early, width))
    dkv = (
        (arrived + jnp.concatenate(here, 1)).astype(given.dtype)
        for arrived, *here in zip(_unpair(home, width), *parts, strict=True)
    )
    return dq.astype(q.dtype), _pair(*dkv)


def _gradients(
    shards: Shards,
    rows: tuple[Array, Array, Array, Array],
    width: int,
    dq: Array | None,
    kv: Array,
    mask: dict[str, Any],
    keys: slice = slice(None),
) -> tuple[Array, Array]:
    """`dq` and what some keys of a block add to it, and their dk and dv, paired; in float32.

    `rows` is all that the backward needs to know of the queries: (q, do, lse, delta).
    """
    q, do, lse, delta = rows
    k, v = _unpair(kv, width, keys)
    start = keys.start or 0
    mask = {name: x - start if name in ("lo", "hi") else x for name, x in mask.items()}
    dq, dk, dv = block_backward(
        q, k, v, do, lse, delta, accumulate=(dq, None, None), q_offset=-start,
        out_dtype=lse.dtype, **mask, **shards.options,
    )  # fmt: skip
    return dq, _pair(dk, dv)


def _pair(k: Array, v: Array) -> Array:
    """Keys and values, or their gradients, as one message.

    Stacked if equally wide: then each lies in one piece, and kernels read it where it arrives.
    """
    return jnp.stack([k, v]) if k.shape == v.shape else pack(k, v)


def _unpair(kv: Array, width: int, keys: slice = slice(None)) -> tuple[Array, Array]:
    """The inverse of `_pair`, for keys `width` wide; or some of the keys and values."""
    if kv.ndim == 5:
        return kv[0, :, keys], kv[1, :, keys]
    return unpack(kv[:, keys], width)


def _axis(message: Array) -> int:
    """The axis along which messages hold keys and values: the first if they are stacked."""
    return 0 if message.ndim == 5 else -1


def _join(kv: Array | None, sums: Array | None, last: Array | None) -> Array | None:
    """Keys and values, and the sums of their gradients, as one message; None of nothing.

    A GPU hides one message at a time behind a kernel; a second one would wait for it. Where kv
    has arrived in a message like this one, `last`, the new sums take the place of the old.
    """
    if kv is None or sums is None:
        return sums if kv is None else kv
    axis = _axis(sums)
    if last is None or last.shape == sums.shape:
        words = _words(kv)
        return jnp.concatenate([words, lax.bitcast_convert_type(sums, words.dtype)], axis)
    before = last.shape[axis] - sums.shape[axis]
    sums = lax.bitcast_convert_type(sums, last.dtype)
    return lax.dynamic_update_slice_in_dim(last, sums, before, axis)


def _split(
    message: Array | None, kv: Array, sums: Array | None
) -> tuple[Array, Array | None, Array | None]:
    """The parts of a message from `_join`, or `kv` and None where it has no such part; and it.

    They are like `kv` and `sums`, which this rank has sent.
    """
    if message is None or sums is None:
        return kv if message is None else message, None, message
    if message.shape == sums.shape:
        return kv, message, message
    axis = _axis(sums)
    before = message.shape[axis] - sums.shape[axis]
    words = lax.slice_in_dim(message, 0, before, axis=axis)
    kv = _from_words(words, kv.dtype, kv.shape[axis])
    kv, message = lax.optimization_barrier((kv, message))  # `_join` is to overwrite it, not a copy
    moved = lax.slice_in_dim(message, before, None, axis=axis)
    return kv, lax.bitcast_convert_type(moved, sums.dtype), message


def _words(x: Array) -> Array:
    """The bits of x as unsigned integers as wide as sums are: two 16-bit numbers to a word."""
    if x.dtype.itemsize > 2:
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    axis = _axis(x) % x.ndim
    x = jnp.pad(x, [(0, size % 2 if a == axis else 0) for a, size in enumerate(x.shape)])
    high, low = jnp.split(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32), 2, axis)
    return high << 16 | low


def _from_words(words: Array, dtype: jnp.dtype, size: int) -> Array:
    """The inverse of `_words`, for numbers of `dtype`, `size` along their axis."""
    if dtype.itemsize > 2:
        return lax.bitcast_convert_type(words, dtype)
    x = jnp.concatenate([words >> 16, words & 0xFFFF], _axis(words)).astype(jnp.uint16)
    return lax.slice_in_dim(lax.bitcast_convert_type(x, dtype), 0, size, axis=_axis(words))
