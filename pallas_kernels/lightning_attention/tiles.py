"""What a lightning-attention call looks like to a backend, and the tile sizes it may choose."""

import dataclasses
import math

import jax
import jax.numpy as jnp


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


# Of H100 and H200. A price is the time of a chunk of 64 tokens in microseconds, for a block alone
# and for each of a full wave of them, by workers; measured on an H100 at head width 128.
MULTIPROCESSORS = 132
SWEEP = {1: (1.3, 1.7), 2: (2.1, 3.1)}
STATE = (0.9, 1.5)
SEGMENT = 3.0  # to write, join and read its states


def gpu_tiles(heads: int, chunks: int, slices: list[int], widest: int) -> GpuTiles:
    """The default: the sequence in as many segments as make the call cheapest.

    Args:
      heads: batch rows times heads.
      chunks: of 64 tokens.
      slices: of 64 columns, in each array that one launch makes.
      widest: slices of the widest array that it reads.
    """

    def waves(blocks: int, alone: float, full: float) -> float:
        whole, rest = divmod(blocks, MULTIPROCESSORS)
        return whole * full + (alone + (full - alone) * rest / MULTIPROCESSORS if rest else 0)

    def price(tiles: GpuTiles) -> float:
        workers, segments = tiles.workers, tiles.segments
        blocks = heads * segments * sum(n // math.gcd(n, workers) for n in slices)
        per_chunk = waves(blocks, *SWEEP[workers])
        if segments > 1:
            blocks = heads * (segments - 1) * -(-max(slices) // 2) * min(len(slices), 2)
            per_chunk += waves(blocks, *STATE)
        return per_chunk * -(-chunks // segments) + SEGMENT * (segments if segments > 1 else 0)

    kinds = [(2, 2), (1, 3)] if widest <= 2 else [(1, 3 if widest == 3 else 2)]
    segments = range(1, max(1, min(64, chunks // 8)) + 1)
    return min((GpuTiles(n, *kind) for n in segments for kind in kinds), key=price)


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
    """The default for the TPU being compiled for; for an unknown one what every TPU can run."""
    target = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    chunk = TPU_CHUNK.get(target.device_kind, 128)
    rows = TPU_BLOCK_BYTES // (width * jnp.dtype(dtype).itemsize)
    return TpuTiles(chunk, max(rows // chunk, 1) * chunk)
