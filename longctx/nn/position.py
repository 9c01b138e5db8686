"""Rotations that tell queries and keys where they stand: LRPE-d's and RoPE."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.nn.cache import Cache
from longctx.nn.sharding import AxisName, parameter
from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import sequence_axis


def token_positions(length: int, doc_start: Int[Array, "B T"] | None = None) -> Int[Array, "#B T"]:
    """Position of each token in its document: t - max(doc_start[b, t], 0)."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    return positions if doc_start is None else positions - jnp.maximum(doc_start, 0)


def default_positions(
    length: int,
    *,
    doc_start: Int[Array, "B T"] | None,
    cache: Cache | None,
    layout: Layout | Kind,
    axis: str | None,
) -> Int[Array, "#B T"]:
    """Positions of the tokens a module is called on, when the caller gives none.

    Raises:
      ValueError: they do not follow from the slots: the tokens are in another order than their
        positions, or these are one device's tokens of a sharded sequence.
    """
    if cache is not None:
        return cache.length[:, None] + token_positions(length)
    devices, inside = sequence_axis(axis)
    if (inside and devices > 1) or not as_layout(layout, devices).in_order:
        raise ValueError(f"{layout=} over {devices} devices, {inside=}: give the tokens' positions")
    return token_positions(length, doc_start)


class LRPE(nnx.Module):
    """Linearised relative position encoding with learnable angles (2307.14995, section 3.1.1).

    x -> [x cos(theta p), x sin(theta p)]: twice the width, so that q_t . k_s becomes
    sum_j q_tj k_sj cos(theta_j (t - s)). With a decay beside it, it is the paper's LRPE-d.
    The angles start at 10000^(-2j / (H D)), j running over heads, then features (authors' code).
    """

    def __init__(self, num_heads: int, head_dim: int, *, axis: AxisName, rngs: nnx.Rngs):
        def angles(
            key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
        ) -> Float[Array, "H D"]:
            size = num_heads * head_dim
            return (10000.0 ** (-2.0 * jnp.arange(size) / size)).reshape(shape).astype(dtype)

        self.theta = parameter(angles, (num_heads, head_dim), jnp.float32, (axis, None), rngs)

    def __call__(
        self, positions: Int[Array, "#B T"], *arrays: Float[Array, "B T H D"]
    ) -> tuple[Float[Array, "B T H 2*D"], ...]:
        """Encode every array alike; the angle is computed in float32, once."""
        # A product, not an einsum: matrix units would round positions beyond a few hundred.
        angle = positions.astype(jnp.float32)[:, :, None, None] * self.theta[...][None, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return tuple(jnp.concatenate([x * cos, x * sin], axis=-1).astype(x.dtype) for x in arrays)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE's wavelengths are stretched to reach lengths beyond those trained on.

    "linear" divides every frequency by `factor` (2306.15595). "ntk" raises the base to
    base * factor^(D / (D - 2)), which leaves the fastest frequency alone and divides the slowest
    by `factor`. "llama3" divides only frequencies whose wavelength exceeds `original_length`,
    keeps those `high_frequency` times shorter, and blends in between (2407.21783 and its code).
    """

    kind: Literal["none", "linear", "ntk", "llama3"] = "none"  # which frequencies are divided
    factor: float = 1.0  # how many times the trained length is to be reached
    original_length: int = 8192  # Llama 3's trained length; "llama3" only
    low_frequency: float = 1.0  # Llama 3.1; "llama3" only
    high_frequency: float = 4.0  # Llama 3.1; "llama3" only

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "ntk", "llama3"):
            raise ValueError(f"rope scaling kind={self.kind!r} must be none, linear, ntk or llama3")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor={self.factor} must be at least 1")


NO_SCALING = RopeScaling()


def rope_frequencies(
    width: int, base: float, scaling: RopeScaling = NO_SCALING
) -> Float[Array, "D/2"]:
    """Angular frequencies base^(-2j / D), j < D / 2, stretched by `scaling`; float32."""
    if scaling.kind == "ntk" and width > 2:
        base = base * scaling.factor ** (width / (width - 2))
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_length * frequencies / (2 * jnp.pi)
        low, high = scaling.low_frequency, scaling.high_frequency
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / scaling.factor)
    return frequencies
