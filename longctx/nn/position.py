"""Rotations that tell queries and keys where they stand: LRPE-d's and RoPE."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.attention.rotary import rope
from longctx.nn.sharding import AxisName, parameter

__all__ = ["LRPE", "RopeScaling", "rope", "rope_frequencies", "token_positions"]


def token_positions(
    length: int,
    doc_start: Int[Array, "B T"] | None = None,
    offset: Int[Array, "B"] | None = None,
) -> Int[Array, "#B T"]:
    """Position of each token in its document.

    position[b, t] = offset[b] + t - max(doc_start[b, t], 0), where an absent term is 0. `offset`
    is the number of tokens that a cache already holds.
    """
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    if offset is not None:
        positions = positions + offset[:, None]
    if doc_start is not None:
        positions = positions - jnp.maximum(doc_start, 0)
    return positions


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
        angle = jnp.einsum("bt,hd->bthd", positions.astype(jnp.float32), self.theta[...])
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

    kind: Literal["none", "linear", "ntk", "llama3"] = "none"
    factor: float = 1.0
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
