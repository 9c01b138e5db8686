"""Rotary position embedding as an operator; frequencies are chosen in `longctx.nn.position`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(
    positions: Int[Array, "#B T"],
    frequencies: Float[Array, "D/2"],
    *arrays: Float[Array, "B T _ D"],
) -> tuple[Float[Array, "B T _ D"], ...]:
    """Rotary position embedding (2104.09864): feature j is paired with feature j + R / 2.

    R = 2 * len(frequencies) leading features are rotated, the others pass. Computed in float32.
    """
    # A product, not an einsum: matrix units would round positions beyond a few hundred.
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin, half = jnp.cos(angle), jnp.sin(angle), frequencies.shape[0]

    def rotate(x: Float[Array, "B T _ D"]) -> Float[Array, "B T _ D"]:
        first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate([*(y.astype(x.dtype) for y in turned), rest], axis=-1)

    return tuple(map(rotate, arrays))
