"""Writing new tokens into a cache whose rows have seen different numbers of tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def append(
    memory: Shaped[Array, "B S *F"],
    x: Shaped[Array, "B T *F"],
    start: Int[Array, "B"],
    new: Int[Array, "B"],
) -> Shaped[Array, "B S *F"]:
    """`memory` with the first new[b] tokens of x[b] written from start[b] on.

    Padding, and what no longer fits, goes nowhere.
    """
    step = jnp.arange(x.shape[1], dtype=start.dtype)[None]
    slot = jnp.where(step < new[:, None], start[:, None] + step, memory.shape[1])
    row = jnp.broadcast_to(jnp.arange(x.shape[0])[:, None], slot.shape)
    return memory.at[row, slot].set(x.astype(memory.dtype), mode="drop")
