"""Channel mixers: gated linear units and the plain two-layer MLP."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longctx.nn.linear import INIT_STD, Linear
from longctx.nn.sharding import DEFAULT_AXES, Axes

type Weights = tuple[Array, Array]  # of the two projections, as `Linear.weight` gives them
type Activation = Literal["none", "silu", "gelu", "sigmoid", "elu1"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "elu1": lambda x: 1 + jax.nn.elu(x),
}


def activation_function(name: Activation) -> Callable[[Array], Array]:
    """The function called `name`.

    Raises:
      ValueError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class _Channels(nnx.Module):
    expand: Linear
    contract: Linear

    def weights(self) -> Weights:
        """What a call takes of the parameters."""
        return self.expand.weight(), self.contract.weight()


class GLU(_Channels):
    """(act(x Wv) * x Wu) Wo: with activation "none" SGLU (2307.14995), with "silu" SwiGLU."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "none",
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axes: Axes = DEFAULT_AXES,
        rngs: nnx.Rngs,
    ):
        kwargs = {
            "axes": axes,
            "std": std,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.expand = Linear(width, (2, hidden), spec=(axes.fsdp, None, axes.tensor), **kwargs)
        self.contract = Linear(hidden, width, spec=(axes.tensor, axes.fsdp), **kwargs)
        self.activation = activation_function(activation)

    def __call__(
        self, x: Float[Array, "B T M"], weights: Weights | None = None
    ) -> Float[Array, "B T M"]:
        """Mix channels, token by token."""
        expand, contract = weights or self.weights()
        both = self.expand(x, expand)
        return self.contract(self.activation(both[..., 0, :]) * both[..., 1, :], contract)


class MLP(_Channels):
    """act(x Wi) Wo."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axes: Axes = DEFAULT_AXES,
        rngs: nnx.Rngs,
    ):
        kwargs = {
            "axes": axes,
            "std": std,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.expand = Linear(width, hidden, spec=(axes.fsdp, axes.tensor), **kwargs)
        self.contract = Linear(hidden, width, spec=(axes.tensor, axes.fsdp), **kwargs)
        self.activation = activation_function(activation)

    def __call__(
        self, x: Float[Array, "B T M"], weights: Weights | None = None
    ) -> Float[Array, "B T M"]:
        """Mix channels, token by token."""
        expand, contract = weights or self.weights()
        return self.contract(self.activation(self.expand(x, expand)), contract)
