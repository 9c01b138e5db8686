"""Writing new tokens into a cache whose rows have seen different numbers of tokens."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from longctx.parallel.placement import placed_by_xla, split_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSlots:
    """The slots of one layer among those of all, for new tokens to be written where these lie.

    Taken out and put back, all tokens of the layer would be copied for each new one.
    """

    layers: Shaped[Array, "L B S *F"]
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's slots."""
        return self.layers.shape[1:]


def append[Memory: (Array, LayerSlots)](
    memory: Memory, x: Shaped[Array, "B T *F"], start: Int[Array, "B"], new: Int[Array, "B"]
) -> Memory:
    """`memory`, [B, S, *F], with the first new[b] tokens of x[b] written from start[b] on.

    Padding, and what no longer fits, goes nowhere.
    """
    if isinstance(memory, LayerSlots):
        layers = _written(memory.layers, x, start, new, memory.layer)
        return dataclasses.replace(memory, layers=layers)
    return cast(Memory, _written(memory, x, start, new))


def _written(memory: Array, x: Array, start: Array, new: Array, *layer: Array) -> Array:
    """`memory`, of one layer or of all, with the tokens where they go."""

    def write(memory: Array, x: Array, start: Array, new: Array, *layer: Array) -> Array:
        place = *layer, *_places(memory.shape[1 + len(layer)], x, start, new)
        return memory.at[place].set(x.astype(memory.dtype), mode="drop")

    return placed_by_xla(write, memory, x, start, new, *layer, split=split_of(memory))


def _places(slots: int, x: Array, start: Array, new: Array) -> tuple[Array, Array]:
    """Row and slot of each token; slots that are not there for those that go nowhere."""
    step = jnp.arange(x.shape[1], dtype=start.dtype)[None]
    slot = jnp.where(step < new[:, None], start[:, None] + step, slots)
    return jnp.broadcast_to(jnp.arange(x.shape[0])[:, None], slot.shape), slot


def held(memory: Array | LayerSlots) -> Shaped[Array, "B S *F"]:
    """All slots."""
    if not isinstance(memory, LayerSlots):
        return memory
    layers, layer = memory.layers, memory.layer
    return jax.lax.dynamic_index_in_dim(layers, layer, keepdims=False, allow_negative_indices=False)
