"""What a lightning-attention call looks like to a backend, and the tile sizes it may choose."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels._dispatch import target
from pallas_kernels._tuned import tuned_tiles


def state_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of states and sums for inputs of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call: what a backend looks at to accept or refuse it."""

    batch: int
    length: int
    heads: int
    key_width: int
    value_width: int
    dtype: jnp.dtype
    packed: bool


@dataclasses.dataclass(frozen=True)
class XlaTiles:
    """Tokens per chunk: larger chunks run fewer steps but spend more on the masked triangle."""

    chunk: int = 64

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """How the Hopper kernels share out a call.

    `segments`: pieces of the sequence that run side by side. `workers`: compute warpgroups in a
    block, each making 64 columns. `stages`: chunks of 64 tokens in flight.
    """

    segments: int
    workers: int
    stages: int

    def __post_init__(self):
        if self.segments < 1:
            raise ValueError(f"segments={self.segments} must be at least 1")
        if self.workers not in (1, 2):
            raise ValueError(f"workers={self.workers} must be 1 or 2")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")


@dataclasses.dataclass(frozen=True)
class Prices:
    """What a call costs on one kind of GPU, from which `gpu_tiles` finds the cheapest split.

    A pair is the time of a chunk of 64 tokens in microseconds, for a block alone and for each of
    a full wave of blocks, at head width 128.

    Attributes:
      multiprocessors: blocks of a full wave.
      one_worker, two_workers: of the sweep, by its compute warpgroups.
      states: of the pass that finds the segments' states.
      segment: microseconds to write, join and read the states of a segment.
    """

    multiprocessors: int
    one_worker: tuple[float, float]
    two_workers: tuple[float, float]
    states: tuple[float, float]
    segment: float

    def waves(self, blocks: int, price: tuple[float, float]) -> float:
        """Microseconds that a chunk of each of `blocks` takes."""
        alone, full = price
        whole, rest = divmod(blocks, self.multiprocessors)
        return whole * full + (alone + (full - alone) * rest / self.multiprocessors if rest else 0)

    def of(self, tiles: GpuTiles, heads: int, chunks: int, slices: Sequence[int]) -> float:
        """Microseconds of a call: `heads`, `chunks` and `slices` as in `gpu_tiles`."""
        workers, segments = tiles.workers, tiles.segments
        blocks = heads * segments * sum(n // math.gcd(n, workers) for n in slices)
        per_chunk = self.waves(blocks, self.two_workers if workers == 2 else self.one_worker)
        if segments > 1:
            blocks = heads * (segments - 1) * -(-max(slices) // 2) * min(len(slices), 2)
            per_chunk += self.waves(blocks, self.states)
        return per_chunk * -(-chunks // segments) + self.segment * (segments if segments > 1 else 0)


H100 = Prices(
    multiprocessors=132,
    one_worker=(1.3, 1.7),
    two_workers=(2.1, 3.1),
    states=(0.9, 1.5),
    segment=3.0,
)


def gpu_tiles(heads: int, chunks: int, slices: Sequence[int], widest: int) -> GpuTiles:
    """The default: the sequence in as many segments as make the call cheapest.

    Prices are those tuned for the device, else an H100's.

    Args:
      heads: batch rows times heads.
      chunks: of 64 tokens.
      slices: of 64 columns, in each array that one launch makes.
      widest: slices of the widest array that it reads.
    """
    prices = tuned_tiles("lightning_attention", "gpu", Prices) or H100
    kinds = [(2, 2), (1, 3)] if widest <= 2 else [(1, 3 if widest == 3 else 2)]
    segments = range(1, max(1, min(64, chunks // 8)) + 1)
    choices = (GpuTiles(n, *kind) for n in segments for kind in kinds)
    return min(choices, key=lambda tiles: prices.of(tiles, heads, chunks, slices))


@dataclasses.dataclass(frozen=True)
class TpuTiles:
    """Tokens per chunk, the edge of the triangle, and per block, what one grid step moves."""

    chunk: int
    block: int

    def __post_init__(self):
        if self.chunk < 128 or self.chunk % 128:
            raise ValueError(
                f"chunk={self.chunk} must be a multiple of the 128 lanes of a register"
            )
        if self.block < self.chunk or self.block % self.chunk:
            raise ValueError(f"block={self.block} must be a multiple of chunk={self.chunk}")


# Edge of the matrix unit, by the device kinds that JAX reports.
TPU_CHUNK = {"TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 256, "TPU7x": 256}
TPU_BLOCK_BYTES = 1024 * 128 * 2  # of one operand: the six of the backward, twice, in 4 MiB


def tpu_tiles(width: int, dtype: jnp.dtype) -> TpuTiles:
    """As tuned, or by the TPU being compiled for; for an unknown one what every TPU can run."""
    tuned = tuned_tiles("lightning_attention", tpu_key(width, dtype), TpuTiles)
    if tuned is not None:
        return tuned
    chunk = TPU_CHUNK.get(target().device_kind, 128)
    rows = TPU_BLOCK_BYTES // (width * jnp.dtype(dtype).itemsize)
    return TpuTiles(chunk, max(rows // chunk, 1) * chunk)


def tpu_key(width: int, dtype: jnp.dtype) -> str:
    """The entry of the tuned table for heads of a width."""
    return f"tpu {width} {jnp.dtype(dtype).name}"
