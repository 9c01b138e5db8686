"""Writing new tokens into a cache whose rows have seen different numbers of tokens."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


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
        place = (memory.layer, *_places(memory.shape[1], x, start, new))
        layers = memory.layers.at[place].set(x.astype(memory.layers.dtype), mode="drop")
        return dataclasses.replace(memory, layers=layers)
    place = _places(memory.shape[1], x, start, new)
    return cast(Memory, memory.at[place].set(x.astype(memory.dtype), mode="drop"))


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
