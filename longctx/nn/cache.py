"""What decoding remembers: one type for the KV cache, the recurrent state, and stacks of both."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int


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
    cache: Cache | None, lengths: Int[Array, "B"] | None, doc_start: Int[Array, "B T"] | None
) -> None:
    """Raise ValueError if arguments of a mixer that only make sense apart are given together."""
    if cache is None and lengths is not None:
        raise ValueError("lengths needs a cache: without one, padding at the end changes nothing")
    if cache is not None and doc_start is not None:
        raise ValueError("doc_start cannot be given with a cache: a cached row is one document")
