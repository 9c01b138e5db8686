"""One attention call over a sharded sequence, as every device sees it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from longctx.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class Shards:
    """What is static about a call: how the sequence is cut, and who sees what.

    `ranks * inner` devices lie along `axis`; `inner` of them together hold one rank's tokens.
    Every function below is called after those tokens have been brought together, so that a
    "rank" is the unit that holds `length / ranks` tokens in ascending order.
    """

    axis: str
    ranks: int
    layout: Layout
    length: int
    inner: int = 1
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    head_groups: int = 1  # of a ring
    deterministic: bool = False
    backend: str = "auto"

    @property
    def local(self) -> int:
        """Tokens of one rank."""
        return self.length // self.ranks

    @property
    def hops(self) -> int:
        """Blocks of keys that a ring must visit, the rank's own included.

        A window over contiguous shards reaches back over a few ranks only.
        """
        if self.window is not None and self.layout.kind == "contiguous":
            return min(self.ranks, 1 + -(-(self.window - 1) // self.local))
        return self.ranks

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the flash attention kernels that do not depend on the block."""
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "deterministic": self.deterministic,
            "backend": self.backend,
        }

    def rank(self) -> Int[Array, ""]:
        """The rank of the device that runs this."""
        return lax.axis_index(self.axis) // self.inner

    def shift(self, ranks: int) -> list[tuple[int, int]]:
        """(source, target) device pairs that move data `ranks` ranks on, around the ring."""
        size = self.ranks * self.inner
        return [(p, (p + ranks * self.inner) % size) for p in range(size)]

    def groups(self) -> list[list[int]] | None:
        """The devices of each rank, for collectives within ranks; None when there is one rank."""
        if self.ranks == 1:
            return None
        return [[r * self.inner + i for i in range(self.inner)] for r in range(self.ranks)]

    def seen_positions(
        self, batch: int, doc_start: Int[Array, "B T"] | None
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Positions `[first, stop)` of the keys that each of this rank's queries sees."""
        position = self.layout.positions(self.length, self.ranks, self.rank())
        first = jnp.zeros_like(position)
        if self.window is not None:
            first = jnp.maximum(position - self.window + 1, 0)
        stop = position + 1 if self.causal else jnp.full_like(position, self.length)
        first, stop = (jnp.broadcast_to(x, (batch, x.size)) for x in (first, stop))
        if doc_start is not None:
            first = jnp.maximum(first, doc_start)
        return first, stop

    def own_block(self, batch: int, doc_start: Int[Array, "B T"] | None) -> dict[str, Any]:
        """Mask arguments for the rank's own keys: static where slots order as positions do."""
        distances_kept = self.window is None or self.layout.kind == "contiguous"
        if doc_start is None and distances_kept:
            return {"causal": self.causal, "window": self.window}
        return self.block(0, batch, doc_start)

    def block(self, hop: int, batch: int, doc_start: Int[Array, "B T"] | None) -> dict[str, Any]:
        """Mask arguments for the keys that arrive with hop `hop`: those of `hop` ranks before."""
        if not self.causal:
            return {}
        source = (self.rank() - hop) % self.ranks
        first, stop = self.seen_positions(batch, doc_start)
        lo, hi = (
            self.layout.count_before(x, self.length, self.ranks, source) for x in (first, stop)
        )
        return {"lo": lo, "hi": hi}


def check_doc_start(doc_start: Array | None, tokens: tuple[int, ...]) -> None:
    """Raise ValueError unless `doc_start` is one integer for each of `tokens` = (B, T), or None."""
    if doc_start is None:
        return
    if doc_start.shape != tokens or not jnp.issubdtype(doc_start.dtype, jnp.integer):
        got = f"{doc_start.dtype} {doc_start.shape}"
        raise ValueError(f"doc_start must be integer [B, T] = {tokens}, got {got}")


def pack(a: jax.Array, b: jax.Array) -> jax.Array:
    """Two arrays that differ in their last axis only, as one buffer: one message, not two."""
    return jnp.concatenate([a, b], -1)


def unpack(packed: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The two arrays of `pack`, the first `width` wide."""
    return packed[..., :width], packed[..., width:]
