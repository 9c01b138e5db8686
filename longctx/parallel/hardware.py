"""What the cost model knows of devices: their rates, and the links between them."""

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links: per second, in FLOPs of bfloat16 products and in bytes."""

    name: str
    flops: float
    memory: float
    permute: float  # to one neighbour
    exchange: float  # out of one device in an all-gather or all-to-all
    latency: float  # seconds, of one collective
    forward: float = 0.635  # share of `flops` that attention reaches on long blocks
    backward: float = 0.545
    forward_half: int = 420  # tokens of a block that runs at half of that share
    backward_half: int = 1000  # and `backward_tail` more for one key head, half of it for two
    backward_tail: int = 0  # where one core does all
    island: int = 2**30  # neighbours along the sequence that `permute` and `exchange` join
    between: float = math.inf  # out of one device to another island

    def forward_seconds(self, flops: float, tokens: int) -> float:
        """Time for a forward's products of attention on blocks of `tokens` rows."""
        return flops / (self.flops * self.forward * tokens / (tokens + self.forward_half))

    def backward_seconds(self, flops: float, tokens: int, key_heads: int) -> float:
        """Of the backward that belongs to a forward of `flops`, over `key_heads` in all sequences.

        A GPU's multiprocessors share out tiles of keys, each with all the queries of its group.
        Those that find no tile left wait for the last: the fewer tiles, the larger a part of all.
        """
        half = self.backward_half + self.backward_tail / key_heads
        return 2.5 * flops / (self.flops * self.backward * tokens / (tokens + half))

    def permute_over(self, devices: int) -> float:
        """Rate of a hop around so many: where islands meet, one device's link carries it."""
        return self.permute if devices <= self.island else min(self.permute, self.between)

    def gather_over(self, devices: int) -> float:
        """Rate of an all-gather: each shard enters an island once, over all of its links."""
        if devices <= self.island:
            return self.exchange
        return min(self.exchange, self.island * self.between)

    def swap_over(self, devices: int) -> float:
        """Rate of an all-to-all: nearly all of it leaves the island."""
        return self.exchange if devices <= self.island else min(self.exchange, self.between)


# By a part of jax's device kind. Peaks and links from the makers' sheets, one way per link (TPU: an
# axis of the torus has two; GPUs: 400 Gb/s each out of a host of 8). Measured: the permute of H100
# and H200, 297 GB/s, and the shares, on one H100 (tests/longctx/parallel/test_cost.py).
_GPU = {"island": 8, "between": 50e9, "backward_tail": 11000}
HARDWARE = {
    "H100": Hardware("H100", 989e12, 3.35e12, 297e9, 297e9, 15e-6, **_GPU),
    "H200": Hardware("H200", 989e12, 4.8e12, 297e9, 297e9, 15e-6, **_GPU),
    "B200": Hardware("B200", 2250e12, 8e12, 600e9, 600e9, 15e-6, **_GPU),
    "TPU v5 lite": Hardware("TPU v5e", 197e12, 0.82e12, 45e9, 90e9, 5e-6, 0.5, 0.45),
    "TPU v5": Hardware("TPU v5p", 459e12, 2.77e12, 90e9, 180e9, 5e-6, 0.5, 0.45),
    "TPU v6": Hardware("TPU v6e", 918e12, 1.64e12, 90e9, 180e9, 5e-6, 0.35, 0.35),
    "TPU7x": Hardware("TPU7x", 2307e12, 7.4e12, 90e9, 180e9, 5e-6, 0.3, 0.3),
}


def hardware_in_use() -> Hardware:
    """That of the mesh in use; H100 for devices not in the table, so that "auto" is the same.

    Devices along `tensor` are closer than those along `seq`, and share an island with them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    kind = "" if device is None else device.device_kind
    found = next((h for part, h in HARDWARE.items() if part in kind), HARDWARE["H100"])
    inner = mesh.shape.get("tensor", 1)
    return dataclasses.replace(found, island=max(1, found.island // inner))
