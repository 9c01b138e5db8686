"""Tensorized attention (arXiv 2410.20926): attention along the dimensions of a folded sequence."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.attention.intervals import check_call
from longctx.attention.tensorized.mixed_radix import (
    Dims,
    Order,
    Positions,
    check_choices,
    check_dims,
    mixed_radix_attention,
)
from longctx.attention.tensorized.variants import VARIANTS

type Variant = Literal["mixed_radix", "dominance", "hierarchical", "kronecker"]


def tensorized_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    dims: Dims,
    variant: Variant = "mixed_radix",
    causal: bool = True,
    order: Order | None = None,
    positions: Positions = "digit",
    frequencies: Float[Array, "D/2"] | None = None,
    self_bias: Float[Array, "L H"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """Attention in one short hop per dimension of the sequence folded into n_1 x ... x n_m.

    Queries, keys and values are made once; each hop updates the values. The paper's causal rule
    could not be verified, so the default is our own choice, and the other readings of it stand
    beside it for comparison:

    * "mixed_radix": hop i is causal attention over a window of n_i tokens that are
      s_i = n_1 ... n_(i-1) apart. Strictly causal; every token of the past is reached by exactly
      one path; equal to dense causal attention on the first n_1 tokens, and everywhere for one
      dimension.
    * "dominance": causal attention along each dimension of the folded sequence. Incomplete: it
      misses about half of the past, and the token just before each block.
    * "hierarchical": one softmax over itself and, along each dimension, the earlier blocks, each
      summarised by attention without a mask. Complete; one more pass per faster dimension.
    * "kronecker": one matrix per dimension, shared by all fibres. Bidirectional only.

    Args:
      q: queries; query head h reads key/value head h // (H // K). Not rotated.
      k: keys, not rotated.
      v: values.
      dims: n_1 ... n_m, fast to slow; the last may be None, as long as the sequence needs.
        "mixed_radix" takes any length, and a token sees the last n_1 ... n_m tokens; the others
        take up to the product, "kronecker" exactly the product.
      order: "slow_first" (the default: every near token brings its own strided history, and
        decoding needs a ring of n_1 rows beside the usual cache) or "fast_first" (the far token
        brings a summary made for the token in between). Of "mixed_radix" and "dominance".
      positions: what RoPE sees as the distance of two tokens: "digit", in steps of the hop's
        stride, which no hop takes beyond n_i, or "global", in tokens.
      frequencies: of RoPE, applied within each hop; None: no rotation.
      self_bias: learned, [m - 1, H]; added in each hop i > 1 to the score of a token with itself
        (from about +4 on: else an untrained slow hop spreads a token's neighbourhood over n_i
        others). Of "mixed_radix"; None: no bias.
      doc_start: position of the first token of each token's document, none of which sees another;
        not of "kronecker". Digits count from the row's first token: in "hierarchical" a document
        that begins inside a block loses sight of part of that block.

    Returns:
      o in q's dtype, [B, T, H, E]. Differentiable once in q, k, v, frequencies and self_bias.
      "mixed_radix" saves for it the values between hops and one float32 per row, head and hop.

    Raises:
      ValueError: an argument breaks a rule of the above or does not belong to the variant;
        `causal=True` with "kronecker", which would leak the future through its scores.
    """
    check_call(q, k, v, doc_start)
    _check_shapes(q, k, v)
    check_dims(dims)
    check_choices("slow_first" if order is None else order, positions)
    if doc_start is not None:  # hops subtract positions, which a narrow or unsigned dtype wraps
        doc_start = doc_start.astype(jnp.int32)
    options: dict[str, Any] = {
        "dims": dims,
        "positions": positions,
        "frequencies": frequencies,
        "scale": scale,
    }
    if variant not in ("mixed_radix", *VARIANTS):
        raise ValueError(f"{variant=} must be one of {['mixed_radix', *VARIANTS]}")
    if causal == (variant == "kronecker"):
        raise ValueError(
            f"{causal=} is not what {variant=} computes: 'kronecker' sums its scores over the "
            "whole sequence, so that no mask can make it causal; the others are causal"
        )
    for name, value, variants in (
        ("self_bias", self_bias, ("mixed_radix",)),
        ("order", order, ("mixed_radix", "dominance")),
        ("doc_start", doc_start, ("mixed_radix", "dominance", "hierarchical")),
    ):
        if value is not None and variant not in variants:
            raise ValueError(f"{name} belongs to {', '.join(variants)}, not to {variant=}")
    if variant == "kronecker":
        if backend != "auto":
            raise ValueError(f"{backend=}: variant 'kronecker' is an einsum and has no backends")
        return VARIANTS[variant](q, k, v, **options)
    options |= {"doc_start": doc_start, "backend": backend}
    if variant != "hierarchical":
        options["order"] = order or "slow_first"
    if variant == "mixed_radix":
        return mixed_radix_attention(q, k, v, self_bias=self_bias, **options)
    return VARIANTS[variant](q, k, v, **options)


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    """Before they are folded, so that a message shows what the caller gave."""
    if not (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape[:3] == v.shape[:3]
    ):
        rule = "q, k and v must be [B, T, H, D], [B, T, K, D] and [B, T, K, E]"
        raise ValueError(f"{rule}, got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"H of q {q.shape} must be a multiple of K of k {k.shape}")
