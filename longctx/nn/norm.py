"""Normalisation over the last axis, with statistics in float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.nn.sharding import parameter
from longctx.parallel.placement import spread

type NormKind = Literal["srms", "rms", "layer"]


class SRMSNorm(nnx.Module):
    """x / rms(x), without parameters: SimpleRMSNorm of TransNormerLLM (2307.14995)."""

    def __init__(self, eps: float = 1e-6, *, rngs: nnx.Rngs | None = None):
        del rngs  # there is nothing to draw; flax's bridge to Linen passes it to every module
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        """Normalise the last axis; dtype in, dtype out."""
        return self._normalise(x.astype(jnp.float32)).astype(x.dtype)

    def _normalise(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)


class RMSNorm(SRMSNorm):
    """weight * x / rms(x) (1910.07467)."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(eps)
        self.weight = parameter(jax.nn.initializers.ones, (width,), param_dtype, (None,), rngs)

    def _normalise(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        return super()._normalise(x) * spread(self.weight[...], x)


class LayerNorm(RMSNorm):
    """weight * (x - mean(x)) / std(x) + bias (1607.06450)."""

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, eps, param_dtype=param_dtype, rngs=rngs)
        self.bias = parameter(jax.nn.initializers.zeros, (width,), param_dtype, (None,), rngs)

    def _normalise(self, x: Float[Array, "*rows M"]) -> Float[Array, "*rows M"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return super()._normalise(centred) + spread(self.bias[...], x)


def make_norm(
    kind: NormKind,
    width: int,
    eps: float = 1e-6,
    *,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> SRMSNorm:
    """The norm named `kind`.

    Raises:
      ValueError: no such norm.
    """
    match kind:
        case "srms":
            return SRMSNorm(eps)
        case "rms":
            return RMSNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
        case "layer":
            return LayerNorm(width, eps, param_dtype=param_dtype, rngs=rngs)
    raise ValueError(f"norm={kind!r} must be one of 'srms', 'rms', 'layer'")
