"""What the cost model knows of devices: their rates, and the links between them."""

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its links: per second, in FLOPs of bfloat16 products and in bytes.

    What is not told is taken to cost nothing.
    """

    name: str
    flops: float
    memory: float  # what copies reach
    permute: float  # to one neighbour
    exchange: float  # out of one device in an all-gather or all-to-all
    latency: float  # seconds, of one collective
    forward: float = 0.75  # share of `flops` that attention reaches where rows see many keys
    backward: float = 0.576
    forward_keys: int = 140  # so many more keys each row seems to see: tiles that are half masked,
    backward_keys: int = 430  # what begins and ends a tile, cores that find no tile
    mask: float = 0.0  # seconds to find the tiles of a block of a forward that came from others
    island: int = 2**30  # neighbours along the sequence that `permute` and `exchange` join
    between: float = math.inf  # out of one device to another island

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


# By a part of jax's device kind. Peaks, memory and links from the makers' sheets, one way per link
# (TPU: an axis of the torus has two; GPUs: 400 Gb/s each out of a host of 8). On H100s and H200s
# copies are taken to reach 80% of that and permutes 66%: a ring's moves alone had 277 to 341 GB/s.
# Shares, keys, mask and latency are fitted to rows of 2026-11-27 to 29; test_cost.py meets them
# within 10%.
_H100 = Hardware(
    "H100", 989e12, 2.68e12, permute=297e9, exchange=297e9, latency=15e-6,
    mask=52e-6, island=8, between=50e9,
)  # fmt: skip
_B200 = {"flops": 2250e12, "memory": 6.4e12, "permute": 600e9, "exchange": 600e9}
HARDWARE = {
    "H100": _H100,
    "H200": dataclasses.replace(_H100, name="H200", memory=3.84e12),
    "B200": dataclasses.replace(_H100, name="B200", **_B200),
    "TPU v5 lite": Hardware("TPU v5e", 197e12, 0.82e12, 45e9, 90e9, 5e-6, 0.5, 0.45),
    "TPU v5": Hardware("TPU v5p", 459e12, 2.77e12, 90e9, 180e9, 5e-6, 0.5, 0.45),
    "TPU v6": Hardware("TPU v6e", 918e12, 1.64e12, 90e9, 180e9, 5e-6, 0.35, 0.35),
    "TPU7x": Hardware("TPU7x", 2307e12, 7.4e12, 90e9, 180e9, 5e-6, 0.3, 0.3),
}


def hardware_of(kind: str) -> Hardware | None:
    """That of devices of jax's kind `kind`, None if it is not in the table."""
    return next((hardware for part, hardware in HARDWARE.items() if part in kind), None)


def hardware_in_use(head_axis: str | None) -> Hardware:
    """That of the mesh in use; H100 for devices not in the table, so that "auto" is the same.

    Devices along `head_axis` are closer than those along the sequence, and share an island with
    them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    found = None if device is None else hardware_of(device.device_kind)
    found = found or HARDWARE["H100"]
    inner = 1 if head_axis is None else mesh.shape.get(head_axis, 1)
    return dataclasses.replace(found, island=max(1, found.island // inner))
