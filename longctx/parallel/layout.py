"""Where each token of a sequence lives when the sequence is spread over devices.

A layout is a permutation of the sequence, applied once to a whole batch on its way to the
devices (after the targets are shifted) and undone only on per-position metrics. Device `p` of
`P` then holds slots `[p * T / P, (p + 1) * T / P)` of the permuted sequence. The picture shows
which of eight chunks lie on which of four ranks:

    contiguous   0 1 | 2 3 | 4 5 | 6 7     one run of the sequence per rank
    zigzag       0 7 | 1 6 | 2 5 | 3 4     equal causal work per rank
    striped      rank r holds the tokens r, r + 4, r + 8, ...

Inside every rank the positions ascend, so the keys that a query may see in a shard, those with
positions in `[first, last]`, are one interval of the shard's slots in all three layouts.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Kind = Literal["contiguous", "zigzag", "striped"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag", "striped")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A token layout over `ranks` ranks.

    `ranks` may divide the number of devices: with R ranks on R * U devices, every rank's tokens
    are cut into U successive pieces. Gathered over its U devices a rank's tokens are then in
    position order, which is what USP needs (Ulysses inside a rank, ring between ranks).
    """

    kind: Kind = "contiguous"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout kind={self.kind!r} must be one of {KINDS}")
        if self.ranks < 1:
            raise ValueError(f"layout ranks={self.ranks} must be at least 1")

    @property
    def in_order(self) -> bool:
        """Whether slots are positions, so that the permutation does nothing."""
        return self.kind == "contiguous" or self.ranks == 1

    def check(self, length: int, devices: int) -> None:
        """Raise ValueError unless `length` tokens can be laid out over `devices` devices."""
        if devices % self.ranks:
            raise ValueError(f"{self} needs {devices=} to be a multiple of its ranks")
        if length % devices:
            raise ValueError(f"{length=} must be a multiple of the {devices} devices that hold it")
        if self.kind == "zigzag" and length % (2 * self.ranks):
            raise ValueError(
                f"{length=} must be a multiple of {2 * self.ranks} (two chunks a rank)"
            )

    def order(self, length: int) -> Int[np.ndarray, "T"]:
        """Position of the token in each slot: `laid_out = original[order]`."""
        self.check(length, self.ranks)
        positions = np.arange(length, dtype=np.int32)
        if self.kind == "zigzag":
            chunks = positions.reshape(2 * self.ranks, -1)
            return np.stack([chunks[: self.ranks], chunks[: self.ranks - 1 : -1]], 1).reshape(-1)
        if self.kind == "striped":
            return positions.reshape(-1, self.ranks).T.reshape(-1)
        return positions

    def apply(self, tree: Any, axis: int = 1) -> Any:
        """Lay out every array of `tree` along `axis`: tokens, targets, positions, doc_start, ..."""
        return self._take(tree, axis, self.order)

    def invert(self, tree: Any, axis: int = 1) -> Any:
        """Bring laid-out arrays, such as a per-token loss, back into position order."""
        return self._take(tree, axis, lambda length: np.argsort(self.order(length)))

    def _take(self, tree: Any, axis: int, order: Any) -> Any:
        def take(x: Any) -> Any:
            module = jnp if isinstance(x, jax.Array) else np
            return module.take(x, order(x.shape[axis]), axis)

        return tree if self.in_order else jax.tree.map(take, tree)

    def positions(self, length: int, devices: int, device: int | Int[Array, ""]) -> Int[Array, "T"]:
        """Positions of the tokens that `device` holds, ascending. `device` may be traced."""
        self.check(length, devices)
        local = length // devices
        rank, slot = self._rank_and_slot(local, devices, device)
        slot = slot + jnp.arange(local, dtype=jnp.int32)
        if self.kind == "striped":
            return rank + self.ranks * slot
        if self.kind == "zigzag":
            chunk = length // (2 * self.ranks)
            late = (2 * self.ranks - 1 - rank) * chunk + slot - chunk
            return jnp.where(slot < chunk, rank * chunk + slot, late)
        return rank * (length // self.ranks) + slot

    def count_before(
        self,
        position: Int[Array, "..."] | Int[np.ndarray, "..."],
        length: int,
        devices: int,
        device: int | Int[Array, "..."] | Int[np.ndarray, "..."],
    ) -> Int[Array, "..."]:
        """How many of the tokens that `device` holds stand before `position`: their first slot.

        The keys with positions in `[first, last]` are the slots `[count_before(first),
        count_before(last + 1))` of the device's shard.
        """
        local = length // devices
        rank, slot = self._rank_and_slot(local, devices, device)
        if self.kind == "striped":
            before = -((rank - position) // self.ranks)
        elif self.kind == "zigzag":
            chunk = length // (2 * self.ranks)
            late = (2 * self.ranks - 1 - rank) * chunk
            before = (position - rank * chunk).clip(0, chunk) + (position - late).clip(0, chunk)
        else:
            before = position - rank * (length // self.ranks)
        return (before - slot).clip(0, local)

    def _rank_and_slot(self, local: int, devices: int, device: Any) -> tuple[Any, Any]:
        """The rank that `device` belongs to, and its first slot among that rank's tokens."""
        pieces = devices // self.ranks
        return device // pieces, device % pieces * local

    def in_position_order(self, shards: jax.Array) -> jax.Array:
        """The sequence [B, T, ...] in position order, from all devices' shards [P, B, T / P, ...].

        Reshapes and transposes only: XLA sees no gather.
        """
        devices, batch, local, *rest = shards.shape
        x = jnp.moveaxis(shards, 0, 1)
        if self.kind == "zigzag":
            x = x.reshape(batch, self.ranks, 2, -1, *rest)
            x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], 1)
        elif self.kind == "striped":
            x = jnp.moveaxis(x.reshape(batch, self.ranks, -1, *rest), 1, 2)
        return x.reshape(batch, devices * local, *rest)

    def in_shards(self, sequence: jax.Array, devices: int) -> jax.Array:
        """The inverse of `in_position_order`."""
        batch, length, *rest = sequence.shape
        x = sequence
        if self.kind == "zigzag":
            x = x.reshape(batch, 2, self.ranks, -1, *rest)
            x = jnp.stack([x[:, 0], x[:, 1, ::-1]], 2)
        elif self.kind == "striped":
            x = jnp.moveaxis(x.reshape(batch, -1, self.ranks, *rest), 2, 1)
        return jnp.moveaxis(x.reshape(batch, devices, length // devices, *rest), 1, 0)


def as_layout(layout: Layout | Kind, devices: int) -> Layout:
    """`layout` itself, or the layout of that kind with one rank per device."""
    return layout if isinstance(layout, Layout) else Layout(layout, devices)
