"""What a lightning-attention call looks like to a backend, and the tile sizes it may choose."""

import dataclasses

import jax.numpy as jnp


def state_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of states and sums for inputs of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call: what a backend looks at to accept or refuse it."""

    batch: int
    length: int
    heads: int
    key_width: int
    value_width: int
    dtype: jnp.dtype
    packed: bool


@dataclasses.dataclass(frozen=True)
class XlaTiles:
    """Tokens per chunk: larger chunks run fewer steps but spend more on the masked triangle."""

    chunk: int = 64

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")
