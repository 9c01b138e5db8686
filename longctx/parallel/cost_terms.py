"""The cost model: seconds of one call of attention over devices, term by term.

Attention runs at a fixed share of the chip's peak, less where rows see few keys; a ring's hop takes
the longer of its compute (of the busiest rank) and its move; every other collective is exposed. A
backward pass has 2.5 times the products of a forward pass. Devices are joined in islands (the GPUs
of a host, the chips of a TPU slice); between islands every device has a slower link of its own.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from longctx.parallel.hardware import Hardware
from longctx.parallel.layout import Layout
from longctx.parallel.shards import Shards
from longctx.parallel.ulysses import kv_copies

Strategy = Literal["ring", "all_gather", "ulysses", "usp"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """One strategy, for one layer: what the busiest device does in a forward and in a backward."""

    strategy: Strategy
    flops: float  # forward; a backward has 2.5 times as many
    forward_bytes: float  # sent by one device
    backward_bytes: float
    forward_seconds: float
    backward_seconds: float
    overlap_threshold: int | None  # tokens per device from which a ring's forward moves are hidden

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclasses.dataclass(frozen=True)
class Call:
    """Attention of some shape, over devices, on some hardware."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    devices: int
    layout: Layout
    causal: bool
    window: int | None
    itemsize: int
    hardware: Hardware
    inner: int = 1  # devices of a rank: a hop moves data past so many

    @property
    def widths(self) -> int:
        """Of a key and a value together."""
        return self.key_width + self.value_width

    @property
    def local(self) -> int:
        """Tokens of a device."""
        return self.length // self.devices

    def kv_bytes(self, itemsize: int) -> float:
        """Keys and values of one device."""
        return self.batch * self.local * self.kv_heads * self.widths * itemsize

    @property
    def pair_flops(self) -> int:
        """Products of a forward for one visible (query, key) pair, over all heads."""
        return 2 * self.batch * self.heads * self.widths

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """Visible pairs of each rank (rows) at each hop of its ring (columns).

        Counted exactly for up to 128 evenly spread queries of every rank.
        """
        ranks, hops = self.devices, np.arange(self.shards.hops)[:, None]
        slots = np.unique(np.linspace(0, self.local - 1, 128).round().astype(int))
        order = self.layout.order(self.length).reshape(ranks, self.local)[:, slots]

        def of_rank(rank: int) -> np.ndarray:
            position = order[rank][None]
            first = np.maximum(position - (self.window or self.length) + 1, 0)
            stop = position + 1 if self.causal else np.full_like(position, self.length)
            before = functools.partial(
                self.layout.count_before,
                length=self.length, devices=ranks, device=(rank - hops) % ranks,
            )  # fmt: skip
            return np.mean(before(stop) - before(first), 1) * self.local

        return np.stack([of_rank(rank) for rank in range(ranks)])

    @functools.cached_property
    def shards(self) -> Shards:
        """The ring that the whole group would run."""
        return Shards("seq", self.devices, self.layout, self.length, window=self.window)

    def forward(self, pairs: float) -> float:
        """Seconds of one forward of this device's queries over some keys, `pairs` in all."""
        chip = self.hardware
        work = pairs + chip.forward_keys * self.local
        return self.pair_flops * work / (chip.flops * chip.forward)

    def backward(self, pairs: float) -> float:
        """Seconds of one backward of this device's queries over some keys."""
        chip = self.hardware
        work = pairs + chip.backward_keys * self.local
        return 2.5 * self.pair_flops * work / (chip.flops * chip.backward)

    def ring(self) -> Cost:
        """Keys travel; moves hide behind blocks."""
        chip = self.hardware
        hops = self.pairs.shape[1]
        busiest = self.pairs.max(0)  # all ranks wait for the slowest of a hop
        kv, dkv = self.kv_bytes(self.itemsize), self.kv_bytes(4)
        forward_traffic, backward_traffic = self.ring_traffic(hops)
        link = chip.permute_over(self.devices * self.inner)
        move, gradient = (size / link + chip.latency for size in (kv, dkv))
        compute = [self.forward(pairs) for pairs in busiest]
        forward = sum(max(c, move) for c in compute[:-1]) + compute[-1]
        forward += forward_traffic / chip.memory
        if self.causal:
            forward += (hops - 1) * chip.mask
        backward = self.backward(busiest[0])
        if hops > 1:
            half = self.backward(busiest[0]) / 2  # of the rank's own keys
            compute = [self.backward(pairs) for pairs in busiest[1:]]
            moves = [0.0] + [gradient] * (hops - 2)  # behind each: keys too, but for the last
            moves = [m + (move if hop + 2 < hops else 0) for hop, m in enumerate(moves)]
            backward = max(half, move) + max(half, gradient) + sum(map(max, compute, moves))
            backward += backward_traffic / chip.memory
        return Cost(
            strategy="ring",
            flops=float(self.pair_flops * busiest.sum()),
            forward_bytes=kv * (hops - 1),
            backward_bytes=(kv + dkv) * (hops - 1),
            forward_seconds=forward,
            backward_seconds=backward,
            overlap_threshold=self.threshold(),
        )

    def ring_traffic(self, hops: int) -> tuple[float, float]:
        """Bytes that a device reads and writes for the ring's sake: forward, backward.

        Counted in bfloat16 programs for H100 with D = E, what kernels carry in float32 included,
        where no rows of a forward wait for the first hop; where they do, it has half as much.
        """
        if hops == 1:
            return 0.0, 0.0
        carried = self.batch * self.local * self.heads * self.value_width * 4
        # The output goes from hop to hop in float32. A hop writes its gradients, reads them and the
        # sum that arrived, and writes the next sum.
        return 2 * carried * (hops - 1), 4 * self.kv_bytes(4) * (hops - 1)

    def threshold(self) -> int:
        """Tokens per device from which a hop computes for longer than its keys travel.

        c^2 pairs of a hop (half of them in a balanced causal layout) against c keys.
        """
        share = 0.5 if self.causal and self.layout.kind != "contiguous" else 1.0
        rate = self.hardware.flops * self.hardware.forward
        link = self.hardware.permute_over(self.devices * self.inner)
        per_key = self.kv_heads * self.itemsize / link
        return math.ceil(rate * per_key / (2 * self.heads * share))

    def all_gather(self) -> Cost:
        """Keys are gathered before the compute, their gradients summed after it."""
        chip, pairs = self.hardware, float(self.pairs.sum(1).max())
        others = self.devices - 1
        kv, dkv = self.kv_bytes(self.itemsize), self.kv_bytes(4)
        # All keys are put in position order, their gradients back: read and written once.
        link = chip.gather_over(self.devices)
        gather = kv * others / link + chip.latency + 2 * kv * self.devices / chip.memory
        scatter = dkv * others / link + chip.latency + 2 * dkv * self.devices / chip.memory
        mask = chip.mask if self.causal else 0.0
        return Cost(
            strategy="all_gather",
            flops=self.pair_flops * pairs,
            forward_bytes=kv * others,
            backward_bytes=dkv * others,
            forward_seconds=gather + self.forward(pairs) + mask,
            backward_seconds=scatter + self.backward(pairs),
            overlap_threshold=None,
        )

    def swapped(self, strategy: Strategy, ranks: int) -> Cost:
        """Ulysses in groups of U devices, and with several ranks a ring between them."""
        chip, inner = self.hardware, self.devices // ranks
        copies = kv_copies(self.heads, self.kv_heads, inner)
        inside = dataclasses.replace(
            self,
            heads=self.heads // inner,
            kv_heads=self.kv_heads * copies // inner,
            devices=ranks,
            inner=inner,
            layout=Layout(self.layout.kind, ranks),
        ).ring()
        tokens = self.batch * self.local
        copied = self.itemsize if copies == 1 else max(self.itemsize, 4)  # heads in float32
        swapped = (
            tokens * self.widths * (self.heads * self.itemsize + self.kv_heads * copies * copied)
        )
        sent = swapped * (inner - 1) / inner
        # q, k, v and o, each also rearranged in memory on both sides.
        exchange = sent / chip.swap_over(inner) + 4 * chip.latency + 4 * swapped / chip.memory
        return dataclasses.replace(
            inside,
            strategy=strategy,
            forward_bytes=inside.forward_bytes + sent,
            backward_bytes=inside.backward_bytes + sent,
            forward_seconds=inside.forward_seconds + exchange,
            backward_seconds=inside.backward_seconds + exchange,
            overlap_threshold=inside.overlap_threshold if ranks > 1 else None,
        )
