"""Softmax attention over a sequence that is sharded over devices: one call, several strategies."""

import functools
import math
from collections.abc import Callable
from typing import Literal, get_args

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.parallel import cost
from longctx.parallel.gather import gather_attention
from longctx.parallel.hardware import hardware_in_use
from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import BATCH, free_size, sequence_axis, shard_operator
from longctx.parallel.ring import ring_attention
from longctx.parallel.shards import Shards, check_doc_start
from longctx.parallel.ulysses import (
    copied_heads,
    kv_copies,
    ulysses_attention,
    whole_attention,
)
from pallas_kernels._dispatch import check_name
from pallas_kernels.flash_attention.api import BACKENDS, make_spec

Strategy = Literal["auto", "ring", "all_gather", "ulysses", "usp"]

_OPERATORS: dict[str, Callable] = {
    "ring": ring_attention,
    "all_gather": gather_attention,
    "ulysses": ulysses_attention,
    "usp": ulysses_attention,
}


def context_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    strategy: Strategy = "auto",
    layout: Layout | Kind = "contiguous",
    causal: bool = True,
    window: int | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    head_groups: int = 1,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    axis: str | None = "seq",
    batch_axes: tuple[str, ...] = BATCH,
    head_axis: str | None = "tensor",
) -> Float[Array, "B T H E"] | tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Attention whose sequence is sharded over the mesh axis `axis`, equal to one device's.

        o = flash_attention(q, k, v, causal=causal, window=window, lo=doc_start)

    with the tokens in position order; here they are in the order of `layout`, into which the
    batch has been brought once (`Layout.apply`). Call it on global arrays under the mesh of
    `jax.set_mesh`, or on local shards inside your own `shard_map` over `axis`. Without a mesh it
    is attention on one device.

    Strategies: "ring" (keys travel, hidden behind the blocks), "all_gather" (of keys and
    values), "ulysses" (tokens are swapped for heads; layout in position order), "usp" (Ulysses
    within each of `layout.ranks` ranks, ring between them), "auto" (the cheapest of those that
    the layout allows, see `explain`). Causal attention wants the zigzag layout, in which all
    ranks have the same work; with a window the contiguous one, in which the ring stops early.
    Rings on GPUs need `longctx.compiler.training_options`, with which `longctx train` compiles, to
    hide all of their moves.

    Args:
      strategy: how the devices cooperate.
      layout: the token layout; a name means one rank per device along `axis` of the mesh of
        `jax.set_mesh`: one rank, slots as they come, without such a mesh.
      causal: whether a token sees no later one.
      window: how many tokens, itself included, a token sees; needs `causal`.
      doc_start: position of the first token of each token's document, laid out as the tokens
        are (its values are positions, not slots); needs `causal`.
      scale, soft_cap, deterministic, backend: as in `flash_attention`.
      head_groups: rings that run one after another, each over an equal part of the heads. Their
        buffers take so much less memory, but kernels are shorter; needs "ring" or "usp".
      return_lse: whether to return (o, lse), lse float32 in natural log.
      axis: mesh axis along the sequence; None: it is not sharded.
      batch_axes: mesh axes along the batch, for global arrays.
      head_axis: mesh axis along the heads, for global arrays.

    Raises:
      ValueError: shapes, layout, strategy or axes do not fit together. All checks come before
        the first collective, so that no device waits for one that has failed.

    Sums across devices are in float32, forward and backward. Differentiable once, in reverse.
    Sources: arXiv 2310.01889, 2309.14509, 2405.07719.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"{strategy=} must be one of {get_args(Strategy)}")
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or v.shape[:3] != k.shape[:3]
        or q.shape[:2] != k.shape[:2]
    ):
        raise ValueError(
            f"q, k, v must be [B, T, H, D], [B, T, K, D], [B, T, K, E], "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must be equally wide, got {q.shape[3]} and {k.shape[3]}")
    check_doc_start(doc_start, q.shape[:2])
    # Raises what kernels would, before the first collective.
    window = make_spec(q, k, v, None, causal, window, 0, scale, soft_cap).window
    check_name(backend, BACKENDS)
    if head_groups < 1 or (head_groups > 1 and strategy not in ("ring", "usp")):
        raise ValueError(f"{head_groups=} must be 1, or more with strategy='ring' or 'usp'")
    if not causal and (window is not None or doc_start is not None):
        raise ValueError("a window and doc_start need causal=True")
    devices, inside = sequence_axis(axis)
    length = q.shape[1] * devices if inside else q.shape[1]
    layout = as_layout(layout, devices)
    layout.check(length, devices)
    split = free_size(head_axis)
    if q.shape[2] % k.shape[2] or q.shape[2] % math.lcm(k.shape[2], split):
        raise ValueError(
            f"{q.shape[2]} query heads must be a multiple of {k.shape[2]} key/value heads and of "
            f"the {split} devices along {head_axis=}"
        )
    k, v = copied_heads(k, v, kv_copies(q.shape[2], k.shape[2], split))
    heads, kv_heads = q.shape[2] // split, k.shape[2] // split
    if strategy == "auto":
        strategy = cost.explain(
            batch=q.shape[0] // free_size(batch_axes),
            length=length,
            heads=heads,
            kv_heads=kv_heads,
            key_width=q.shape[3],
            value_width=v.shape[3],
            devices=devices,
            layout=layout,
            causal=causal,
            window=window,
            itemsize=q.dtype.itemsize,
            hardware=hardware_in_use(head_axis),
        ).strategy
    elif devices > 1:
        reason = cost.refusal(strategy, layout, devices, heads, kv_heads)
        if reason is not None:
            raise ValueError(f"{strategy=} {reason}")
    swaps = strategy in ("ulysses", "usp")
    ranks = devices if not swaps else 1 if strategy == "ulysses" else layout.ranks
    dealt = kv_heads * kv_copies(heads, kv_heads, devices // ranks) // (devices // ranks)
    if dealt % head_groups:
        raise ValueError(f"{head_groups=} must divide the {dealt} key heads of a device")
    shards = Shards(
        axis=axis or "",
        ranks=ranks,
        inner=devices // ranks,
        layout=Layout(layout.kind, ranks) if swaps else layout,
        length=length,
        causal=causal,
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        head_groups=head_groups,
        deterministic=deterministic,
        backend=backend,
    )
    attend = whole_attention if devices == 1 else _OPERATORS[strategy]
    rows, tokens = P(batch_axes, axis, head_axis, None), P(batch_axes, axis)
    operator = shard_operator(
        functools.partial(attend, shards),
        (rows, rows, rows, tokens),
        (rows, P(batch_axes, head_axis, axis)),
    )
    o, lse = operator(q, k, v, doc_start)
    return (o, lse) if return_lse else o
