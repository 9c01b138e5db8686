"""Mixed-radix attention on a sequence that is split over devices, in contiguous parts.

    fast hop (stride 1)    each device gets the last n_1 - 1 keys and values of the one before it
    slow hop (stride s)    all-to-all: device p gets the whole history of s / P of the residues,
                           which is a sequence with stride s / P, and sends the outputs back

Nothing else is exchanged; differentiable, since both exchanges are linear.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longctx.attention.tensorized.mixed_radix import Hop, attend_along
from longctx.parallel.ulysses import repeat_heads
from pallas_kernels._pallas import unify_varying, varying_axes


def sharded_mixed_radix(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    hops: tuple[tuple[int, Hop], ...],
    axis: str,
    frequencies: Float[Array, "D/2"] | None = None,
    self_bias: Float[Array, "L H"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """`mixed_radix_attention` inside a `shard_map` over `axis`; T tokens lie on each device.

    `hops` are those of `make_hops` for the whole length; `doc_start` counts from the beginning
    of the whole sequence.

    Raises:
      ValueError: the fastest window reaches beyond the device before, or a stride is no multiple
        of the devices or no divisor of T.
    """
    devices, length, heads = lax.axis_size(axis), q.shape[1], q.shape[2]
    if doc_start is None:
        doc_start = jnp.zeros(q.shape[:2], jnp.int32)
    doc_start = jnp.maximum(doc_start, 0)
    for i, hop in hops:
        bias = None if self_bias is None or i == 0 else self_bias[i - 1]
        if hop.stride == 1:
            if hop.window is None or hop.window - 1 > length:
                raise ValueError(
                    f"the fastest dimension {hop.window} must not exceed {length + 1}, what a "
                    "device and the one before it hold"
                )
            v = _fast(hop, q, k, v, bias, frequencies, doc_start, axis)
        else:
            if hop.stride % devices or length % hop.stride:
                raise ValueError(
                    f"stride {hop.stride} must be a multiple of the {devices} devices along "
                    f"{axis!r} and divide the {length} tokens of each"
                )
            v = _slow(hop, q, k, v, bias, frequencies, doc_start, axis)
    return repeat_heads(v, heads)


def _fast(hop, q, k, v, bias, frequencies, doc_start, axis):
    """A window over the device's own tokens and the tail of the device before."""
    assert hop.window is not None
    halo, length = hop.window - 1, q.shape[1]
    onward = [(p, p + 1) for p in range(lax.axis_size(axis) - 1)]

    def behind(x: Array) -> Array:
        tail = lax.ppermute(x[:, length - halo :], axis, onward)
        return jnp.concatenate([tail, x], axis=1)

    # Places count from the halo's first token; device 0 has no halo, and no document begins there.
    start = jnp.maximum(doc_start - lax.axis_index(axis) * length + halo, 0)
    none = [(0, 0), (halo, 0)]
    q = jnp.pad(q, [*none, (0, 0), (0, 0)])
    o = _attend(hop, q, behind(k), behind(v), bias, frequencies, jnp.pad(start, none))
    return o[:, halo:]


def _slow(hop, q, k, v, bias, frequencies, doc_start, axis):
    """Whole histories of some residues, as a sequence of their own."""
    devices = lax.axis_size(axis)
    stride = hop.stride // devices
    own = dataclasses.replace(hop, stride=stride, spacing=devices)

    def gather(x: Array) -> Array:
        rows = x.reshape(x.shape[0], -1, hop.stride, *x.shape[2:])
        rows = lax.all_to_all(rows, axis, 2, 1, tiled=True)
        return rows.reshape(x.shape)

    def scatter(x: Array) -> Array:
        rows = x.reshape(x.shape[0], -1, stride, *x.shape[2:])
        rows = lax.all_to_all(rows, axis, 1, 2, tiled=True)
        return rows.reshape(x.shape)

    place = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    first = -((place % hop.stride - doc_start) // hop.stride)  # row of the document's first token
    start = jnp.maximum(gather(first) * stride + place % stride, 0)
    return scatter(_attend(own, gather(q), gather(k), gather(v), bias, frequencies, start))


def _attend(hop: Hop, *args: Array | None) -> jax.Array:
    return attend_along(hop, *unify_varying(args, varying_axes(*args)))
