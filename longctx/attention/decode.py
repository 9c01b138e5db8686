"""Decoding over a key/value cache that is sharded along the sequence."""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import BATCH, free_size, sequence_axis, shard_operator
from longctx.parallel.shards import pack, unpack
from longctx.parallel.ulysses import kv_copies, repeat_heads
from pallas_kernels.flash_attention import block_forward


def decode_attention(
    q: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    start: Int[Array, "B"],
    *,
    layout: Layout | Kind = "contiguous",
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    backend: str = "auto",
    axis: str | None = "seq",
    batch_axes: tuple[str, ...] = BATCH,
    head_axis: str | None = "tensor",
) -> Float[Array, "B T H E"]:
    """Attention of a few new tokens over a cache whose S slots are sharded over `axis`.

        o[b, t] = sum over positions p <= start[b] + t of softmax(scale q k_p)[p] v_p

    Every device attends to its own slots; one all-gather of (o, lse), B T H (E + 1) float32 per
    device whatever S is, merges them. Keys never move. q and o are the same on all devices along
    `axis`. With linear attention there is nothing to do: its state is not sharded.

    Args:
      q: queries of the tokens at positions start[b], ..., start[b] + T - 1.
      keys, values: the cache, new tokens included; slot order is that of `layout`, so that a
        prompt which was prefilled in the zigzag layout stays where it is.
      start: tokens before the new ones, for each row.
      layout: the slots' layout; a name means one rank per device along `axis`.
      window: how many tokens, itself included, a token sees.
      scale, soft_cap, backend: as in `flash_attention`.
      axis: mesh axis along the slots; None: they are not sharded.
      batch_axes: mesh axes along the batch, for global arrays.
      head_axis: mesh axis along the heads, for global arrays.

    Raises:
      ValueError: shapes, layout or axes do not fit together.

    Not differentiable. Source: tree attention, arXiv 2408.04093.
    """
    if q.ndim != 4 or keys.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"q, keys, values must be [B, T, H, D], [B, S, K, D], [B, S, K, E], "
            f"got {q.shape}, {keys.shape}, {values.shape}"
        )
    if start.shape != q.shape[:1] or not jnp.issubdtype(start.dtype, jnp.integer):
        raise ValueError(f"start must be integer, [B] = {q.shape[:1]}, got {start}")
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{window=} must be an int, at least 1")
    devices, inside = sequence_axis(axis)
    slots = keys.shape[1] * devices if inside else keys.shape[1]
    layout = as_layout(layout, devices)
    layout.check(slots, devices)
    copies = kv_copies(q.shape[2], keys.shape[2], free_size(head_axis))
    keys, values = (repeat_heads(x, copies * x.shape[2]) for x in (keys, values))

    def attend(q: Array, keys: Array, values: Array, start: Array) -> Array:
        stop = start[:, None] + 1 + jnp.arange(q.shape[1], dtype=start.dtype)[None]
        first = jnp.zeros_like(stop) if window is None else jnp.maximum(stop - window, 0)
        rank = lax.axis_index(axis) if devices > 1 else 0
        lo, hi = (layout.count_before(x, slots, devices, rank) for x in (first, stop))
        o, lse = block_forward(
            q, keys, values, lo=lo, hi=hi, scale=scale, soft_cap=soft_cap, backend=backend
        )
        if devices > 1:
            o = _merge(o, lse, axis)
        return o.astype(q.dtype)

    # Over an axis of one device nothing is merged: what varies along it could not become `rows`.
    cache = P(batch_axes, axis if devices > 1 else None, head_axis, None)
    rows = P(batch_axes, None, head_axis, None)
    return shard_operator(attend, (rows, cache, cache, P(batch_axes)), rows)(q, keys, values, start)


def _merge(
    o: Float[Array, "B T H E"], lse: Float[Array, "B H T"], axis: str | None
) -> Float[Array, "B T H E"]:
    """Attention over all devices' keys, by one collective; 0 for rows that see no key at all."""
    parts = lax.all_gather(pack(o, lse.swapaxes(1, 2)[..., None]), axis, to="invarying")
    o, lse = unpack(parts, o.shape[-1])
    most = jnp.max(lse, 0)
    weight = jnp.exp(lse - jnp.where(most == -jnp.inf, 0, most)[None])
    total = jnp.sum(weight, 0)
    return jnp.sum(weight * o, 0) / jnp.where(total == 0, 1, total)
