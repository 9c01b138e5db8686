"""Other readings of attention tensorization, for the ablation only: no decoding, no sharding.

Each token t has digits d_i, t = sum_i d_i s_i; tokens that differ in digit i alone form a fibre
along dimension i, and RoPE sees the distance of their digits (or of their positions). A sequence
must not be longer than the product of its dimensions.
"""

import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.attention.tensorized.mixed_radix import (
    Dims,
    Hop,
    Order,
    Positions,
    check_dims,
    self_scores,
)
from longctx.parallel.ulysses import repeat_heads
from pallas_kernels.flash_attention import flash_attention, merge


class Fibres:
    """The fibres along one dimension: [B, T, H, D] -> [B outer, n, s H, D], a view."""

    def __init__(self, length: int, stride: int, size: int):
        self.length, self.stride, self.size = length, stride, size
        self.padding = -length % (stride * size)

    def fold(self, x: Float[Array, "B T H D"]) -> Float[Array, "A N C D"]:
        """Padded by zeros at the end, which a causal fibre never reads."""
        x = jnp.pad(x, [(0, 0), (0, self.padding), (0, 0), (0, 0)])
        return x.reshape(-1, self.size, self.stride * x.shape[2], x.shape[3])

    def unfold(self, x: Float[Array, "A N C D"], batch: int) -> Float[Array, "B T H D"]:
        """Back, without the padding."""
        return x.reshape(batch, -1, x.shape[2] // self.stride, x.shape[3])[:, : self.length]

    def unfold_rows(self, x: Float[Array, "A C N"], batch: int) -> Float[Array, "B H T"]:
        """The same for one number per row."""
        rows = jnp.swapaxes(x, 1, 2)[..., None]
        return jnp.swapaxes(self.unfold(rows, batch)[..., 0], 1, 2)

    def digits_before(
        self, position: Int[Array, "B T"] | None, heads: int
    ) -> Int[Array, "A C N"] | None:
        """How many tokens of each token's fibre stand before a position, as a row's lo or hi."""
        if position is None:
            return None
        fibre = self.fold(position[..., None, None])[..., 0]  # [A, n, s]
        base = jnp.arange(fibre.shape[0])[:, None, None] * (self.size * self.stride)
        first = base % (self.padding + self.length) + jnp.arange(self.stride)[None, None]
        count = jnp.clip(-((first - fibre) // self.stride), 0, self.size)
        return jnp.repeat(jnp.swapaxes(count, 1, 2), heads, axis=1)


def sized(dims: Dims, length: int) -> list[tuple[int, int]]:
    """(stride, size) of every dimension, fast to slow; None becomes what the length needs.

    Raises:
      ValueError: dims break their rule, or have no digits for the last tokens.
    """
    check_dims(dims)
    strides = [math.prod(n for n in dims[:i] if n) for i in range(len(dims))]
    sizes = [-(-length // s) if n is None else n for n, s in zip(dims, strides, strict=True)]
    if length > strides[-1] * sizes[-1]:
        raise ValueError(f"length {length} exceeds {strides[-1] * sizes[-1]}, what {dims=} hold")
    return list(zip(strides, sizes, strict=True))


def dominance_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    dims: Dims,
    order: Order = "slow_first",
    positions: Positions = "digit",
    frequencies: Float[Array, "D/2"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """Causal attention along every dimension in turn: causal, and incomplete.

    A token reaches only tokens none of whose digits exceeds its own: about a half of the past
    with two dimensions. The first token of a block never sees the one before it, at any depth,
    since the relation is transitive.
    """
    fibres = sized(dims, q.shape[1])
    for stride, size in fibres if order == "fast_first" else reversed(fibres):
        view, q_r, k_r = _view(q, k, stride, size, positions, frequencies)
        k_r = repeat_heads(k_r, v.shape[2])
        lo = view.digits_before(doc_start, q.shape[2])
        o = flash_attention(*map(view.fold, (q_r, k_r, v)), lo=lo, scale=scale, backend=backend)
        v = view.unfold(cast(Array, o), q.shape[0])
    return v


def hierarchical_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    dims: Dims,
    positions: Positions = "digit",
    frequencies: Float[Array, "D/2"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """One softmax over itself and the strictly earlier digits of every dimension: complete.

    Along dimension i a token sees the tokens that share its other digits and have an earlier
    digit i, whose values are F_{i-1}, aggregates over the whole of their faster dimensions:
    F_0 = v, F_i attention along dimension i to values F_{i-1} without a mask. Those blocks lie
    wholly in the past.
    """
    doc_end = None if doc_start is None else _document_ends(doc_start)
    batch, length, heads, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    k, values = repeat_heads(k, heads), repeat_heads(v, heads)
    lse = self_scores(q, k, jnp.zeros(heads, jnp.float32), scale)
    o = values.astype(lse.dtype)
    fibres = sized(dims, length)
    for i, (stride, size) in enumerate(fibres):
        view, q_r, k_r = _view(q, k, stride, size, positions, frequencies)
        folded = tuple(map(view.fold, (q_r, k_r, values)))
        lo, hi = (view.digits_before(x, heads) for x in (doc_start, doc_end))
        options = {"lo": lo, "scale": scale, "backend": backend}
        earlier, lse_i = flash_attention(*folded, q_offset=-1, return_lse=True, **options)
        o_i = view.unfold(earlier, batch)
        o, lse = merge(o, lse, o_i, view.unfold_rows(lse_i, batch))
        if i < len(fibres) - 1:
            whole = flash_attention(*folded, causal=False, hi=hi, **options)
            values = view.unfold(cast(Array, whole), batch)
    return o.astype(q.dtype)


def kronecker_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    dims: Dims,
    positions: Positions = "digit",
    frequencies: Float[Array, "D/2"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H E"]:
    """One n_i x n_i matrix for each dimension, shared by all fibres: bidirectional.

        A_i = softmax(scale / sqrt(T / n_i) sum over the other digits of q . k)
        vec(o) = (A_m (x) ... (x) A_1) vec(v)

    The only reading under which the paper's Kronecker statement is exact. There is no causal
    form: a triangular mask on every A_i still leaks, because A_i sums over the whole sequence.
    """
    batch, length, heads, width = q.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    fibres = sized(dims, length)
    if length != math.prod(size for _, size in fibres):
        raise ValueError(f"length {length} must be the product of {dims=} for variant 'kronecker'")
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    for stride, size in fibres:
        _, q_r, k_r = _view(q, k, stride, size, positions, frequencies)

        def split(x: Array, stride: int = stride, size: int = size) -> Array:
            return x.reshape(batch, -1, size, stride, heads, x.shape[-1])

        wide = jnp.promote_types(q.dtype, jnp.float32)
        scores = jnp.einsum(
            "bunshd,bumshd->bhnm", split(q_r), split(k_r), preferred_element_type=wide
        )
        a = jax.nn.softmax(scores * (scale / math.sqrt(length / size)), axis=-1)
        v = jnp.einsum("bhnm,bumshe->bunshe", a.astype(v.dtype), split(v)).reshape(v.shape)
    return v


VARIANTS: dict[str, Callable[..., Array]] = {
    "dominance": dominance_attention,
    "hierarchical": hierarchical_attention,
    "kronecker": kronecker_attention,
}


def _document_ends(doc_start: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position just behind the last token of each token's document."""
    length = doc_start.shape[1]
    time = jnp.arange(length, dtype=doc_start.dtype)[None]
    begins = jnp.where(doc_start == time, time, length)
    following = jnp.pad(begins[:, 1:], [(0, 0), (0, 1)], constant_values=length)
    return jax.lax.cummin(following, axis=1, reverse=True)


def _view(
    q: Array, k: Array, stride: int, size: int, positions: Positions, frequencies: Array | None
) -> tuple[Fibres, Array, Array]:
    hop = Hop(stride, size, positions)
    time = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    q, k = (hop.rotated(time, frequencies, x) for x in (q, k))
    return Fibres(q.shape[1], stride, size), q, k
