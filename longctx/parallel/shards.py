"""One attention call over a sharded sequence, as every device sees it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from longctx.parallel.layout import Layout
from pallas_kernels._dispatch import target
from pallas_kernels.flash_attention.tiles import gpu_tiles, padded_width

# Visible (query, key) pairs, times query heads to a key head, that hide the move of one token for
# certain: H100s and H200s compute 2500 for as long as it takes (see `explain`).
HIDING = 3072
# Halves 0, 1 of a rank's tokens and 2, 3 of another's by position, of one before and one after it.
APART = (0, 1, 2, 3)
ORDERS = {"zigzag": ((2, 0, 1, 3), (0, 2, 3, 1)), "contiguous": ((2, 3, 0, 1), APART)}


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
        return self._among(batch, doc_start, (self.rank() - hop) % self.ranks)

    def _among(self, batch: int, doc_start: Any, *sources: Any) -> dict[str, Any]:
        """Which keys of some ranks, in the order of their positions, this rank's queries see."""
        seen = zip(("lo", "hi"), self.seen_positions(batch, doc_start), strict=True)
        count = functools.partial(self.layout.count_before, length=self.length, devices=self.ranks)
        return {name: sum(count(x, device=source) for source in sources) for name, x in seen}

    def early_rows(self, group: int, width: int) -> int:
        """How many rows wait with their own keys for those of a forward's first hop: half, or none.

        They then meet both in one block. None do where the others would not hide the first move,
        with `group` query heads to a key head; where the halves of two ranks do not lie as in
        `ORDERS`; and where kernels for heads of `width` do not read halves where they lie: those
        for TPUs, and others if the halves are no whole tiles.
        """
        kind, ranks = self.layout.kind, self.layout.ranks
        ordered = kind == "contiguous" or (kind == "zigzag" and ranks == self.ranks)
        platform, half = target().platform, self.local // 2
        keys = min(self.window or self.local, self.local - half / 2)  # that a late row sees
        hidden = half * keys * group >= HIDING * self.local
        if self.hops == 1 or not ordered or not hidden or platform == "tpu" or self.local % 2:
            return 0
        if platform != "gpu":
            return half
        tiles = gpu_tiles(padded_width(width)).forward
        return 0 if half % tiles.kv else half - half % tiles.q

    def joint_block(
        self, batch: int, doc_start: Int[Array, "B T"] | None, early_rows: int
    ) -> tuple[Int[Array, "4"], dict[str, Any]]:
        """The order of the halves 0, 1 of the own keys and 2, 3 of the first hop's, and the mask.

        The order is that of their positions. Late rows have seen their own keys before.
        """
        rank, half = self.rank(), self.local // 2
        source = (rank - 1) % self.ranks
        cases = ORDERS[self.layout.kind] if self.causal else (APART, APART)

        def chosen(before: tuple[int, ...], after: tuple[int, ...]) -> Array:
            return jnp.where(source < rank, jnp.array(before), jnp.array(after))

        late = jnp.arange(self.local) >= early_rows
        first, stop = chosen(*map(_arrived, cases)) * half
        seen = self._among(batch, doc_start, rank, source)
        mask = {name: jnp.where(late, x.clip(first, stop), x) for name, x in seen.items()}
        return chosen(*cases), mask


def _arrived(order: tuple[int, ...]) -> tuple[int, int]:
    """Where in an order of pieces the run of 2, and 3 behind it, starts and stops."""
    first = order.index(2)
    return first, first + 1 + (order[first + 1 : first + 2] == (3,))


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
