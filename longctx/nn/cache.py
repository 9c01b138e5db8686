"""What decoding remembers: one type for the KV cache, the recurrent state, and stacks of both."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.attention.slots import LayerSlots
from longctx.parallel.mesh import sequence_axis
from longctx.parallel.shards import check_doc_start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Tokens seen by each row of the batch, and what a mixer (or a stack of them) kept of them.

    `memory` is (k, v), each [B, S, K, D], for softmax attention; the state [B, H, D, E], float32,
    for lightning attention; a tree of such, with a leading axis of layers, for a stack.
    Rows may have seen different numbers of tokens.
    """

    length: Int[Array, "B"]
    memory: Any

    def advance(self, memory: Any, new: int | Int[Array, "B"]) -> "Cache":
        """The cache after `new` more tokens."""
        return Cache(self.length + new, memory)


def check_cached_call(
    x: Float[Array, "B T M"],
    cache: Cache | None,
    lengths: Int[Array, "B"] | None,
    doc_start: Int[Array, "B T"] | None,
) -> None:
    """Raise ValueError if what a mixer is given besides the tokens does not fit."""
    if cache is None and lengths is not None:
        raise ValueError("lengths needs a cache: without one, padding at the end changes nothing")
    if cache is not None and doc_start is not None:
        raise ValueError("doc_start cannot be given with a cache: a cached row is one document")
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must be [B] = {x.shape[:1]}, got {lengths.shape}")
    check_doc_start(doc_start, x.shape[:2])


def tokens_to_append(
    x: Float[Array, "B T M"],
    lengths: Int[Array, "B"] | None,
    slots: Array | LayerSlots,
    axis: str | None,
) -> Int[Array, "B"]:
    """How many tokens of each row go into the slots of a cache: all T if `lengths` is None.

    Raises:
      ValueError: T do not fit, or these are a device's own slots inside a shard_map over `axis`.
    """
    devices, inside = sequence_axis(axis)
    if inside and devices > 1:
        raise ValueError(f"a cache cannot be continued inside a shard_map over {axis=}")
    if lengths is not None:
        return lengths
    if x.shape[1] > slots.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens do not fit into a cache of {slots.shape[1]}")
    return jnp.full(x.shape[0], x.shape[1], jnp.int32)
