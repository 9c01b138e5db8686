"""What a flash attention call is (`Spec`) and the tile sizes it may be computed with (`Tiles`)."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from pallas_kernels._tuned import tuned_tiles


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about one call; backends decide by it whether they can serve the call.

    Row `t` sees the keys `s` of `[lo_t, hi_t)` (all keys when `interval_heads` is 0) with
    `s <= t + q_offset` if `causal` and `s > t + q_offset - window` if there is a window.
    """

    batch: int
    q_length: int
    kv_length: int
    q_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    dtype: jnp.dtype
    causal: bool
    window: int | None
    q_offset: int
    scale: float
    soft_cap: float | None
    interval_heads: int  # 0: no lo and hi; 1: shared by the heads; q_heads: one per head
    out_dtype: jnp.dtype  # of o, and of gradients that are not added to sums
    deterministic: bool

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def wide(self) -> jnp.dtype:
        """The dtype of sums, lse and carries: float32, or float64 for float64 inputs."""
        return jnp.dtype(jnp.float64 if self.dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and keys of one tile of scores."""

    q: int
    kv: int

    def __post_init__(self):
        for name in ("q", "kv"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"Tiles.{name}={size} must be positive")


XLA_TILES = Tiles(q=512, kv=512)


@dataclasses.dataclass(frozen=True)
class KernelTiles(Tiles):
    """Tiles of one Hopper kernel: of `q` rows and `kv` keys; 64 of one of them per warpgroup."""

    stages: int = 2
    early_stages: int = 2  # of the ring of v where dq has its own kernel: v is done with early

    def __post_init__(self):
        super().__post_init__()
        for name in ("q", "kv"):
            size = getattr(self, name)
            if size % 64:
                raise ValueError(f"KernelTiles.{name}={size} must be a multiple of 64")
        for name in ("stages", "early_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"KernelTiles.{name}={getattr(self, name)} must be positive")

    def head_group(self, spec: Spec, keys: int | None = None) -> int:
        """Query heads that run side by side: as many as keep their keys and values in L2.

        `keys` is how many of them rows see at a time, if not all.
        """
        size = 2 * (keys or spec.kv_length) * (spec.key_width + spec.value_width)
        fits = max(24 * 2**20 // size, 1) * spec.group
        return max(n for n in range(1, spec.q_heads + 1) if spec.q_heads % n == 0 and n <= fits)


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """Tiles of the Hopper kernels.

    `passes` says how dk and dv are made: "together", where each warpgroup makes both and may reduce
    dq too; or by "roles", where one makes dv and one dk, since both do not fit its registers. The
    kernel of the `rows` makes dq, except where it is reduced.
    """

    forward: KernelTiles
    keys: KernelTiles
    rows: KernelTiles
    passes: Literal["together", "roles"] = "together"

    def __post_init__(self):
        if self.rows.q % self.keys.q or self.keys.kv % self.rows.kv:
            raise ValueError(
                f"GpuTiles: rows.q={self.rows.q} must be a multiple of keys.q={self.keys.q},"
                f" keys.kv={self.keys.kv} of rows.kv={self.rows.kv}"
            )
        if self.passes not in ("together", "roles"):
            raise ValueError(f"GpuTiles.passes={self.passes!r} must be together or roles")
        if self.passes == "roles" and self.keys.kv != 64:
            raise ValueError(f"GpuTiles: keys.kv={self.keys.kv} must be 64 where passes='roles'")


GPU_TILES = {  # by the larger padded head width; measured on an H100, forward of 64 on an H200
    64: GpuTiles(
        forward=KernelTiles(q=128, kv=128),
        keys=KernelTiles(q=128, kv=128),
        rows=KernelTiles(q=128, kv=128),
    ),
    128: GpuTiles(
        forward=KernelTiles(q=128, kv=128),
        keys=KernelTiles(q=64, kv=128),
        rows=KernelTiles(q=128, kv=128),
    ),
    256: GpuTiles(
        forward=KernelTiles(q=128, kv=64),
        keys=KernelTiles(q=64, kv=64),
        rows=KernelTiles(q=128, kv=64, early_stages=1),
        passes="roles",
    ),
}


def gpu_tiles(width: int) -> GpuTiles:
    """Tiles for padded head width `width`: as tuned for the device, else `GPU_TILES`."""

    def made(passes, **kernels) -> GpuTiles:
        return GpuTiles(passes=passes, **{n: KernelTiles(**x) for n, x in kernels.items()})

    return tuned_tiles("flash_attention", f"gpu {width}", made) or GPU_TILES[width]


def padded_width(width: int) -> int:
    """Of heads on GPUs: the next width of the table, the last for those that are too wide."""
    return min((w for w in GPU_TILES if w >= width), default=max(GPU_TILES))


TPU_LANES = 128


@dataclasses.dataclass(frozen=True)
class TpuTiles(Tiles):
    """Tiles of the TPU kernels: `q` rows by `kv` keys, computed `chunk` keys at a time."""

    chunk: int

    def __post_init__(self):
        super().__post_init__()
        for name in ("q", "kv", "chunk"):
            size = getattr(self, name)
            if size < 1 or size % TPU_LANES:
                raise ValueError(f"TpuTiles.{name}={size} must be a positive multiple of 128")
        if self.kv % self.chunk:
            raise ValueError(f"TpuTiles.chunk={self.chunk} must divide kv={self.kv}")

    def fit(self, spec: Spec) -> "TpuTiles":
        """These tiles, no larger than the padded lengths."""
        q, kv = (
            min(size, length + -length % TPU_LANES)
            for size, length in ((self.q, spec.q_length), (self.kv, spec.kv_length))
        )
        return TpuTiles(q, kv, math.gcd(kv, self.chunk))


def tpu_tiles(spec: Spec) -> TpuTiles:
    """Tiles as tuned, else as large as the fast memory of every generation allows."""
    width = max(spec.key_width, spec.value_width)
    tuned = tuned_tiles("flash_attention", tpu_key(width, spec.dtype), TpuTiles)
    if tuned is not None:
        return tuned.fit(spec)
    size = 1024 if width * spec.dtype.itemsize <= 256 else 512
    return TpuTiles(q=size, kv=size, chunk=512).fit(spec)


def tpu_key(width: int, dtype: jnp.dtype) -> str:
    """The entry of the tuned table for heads of a width."""
    return f"tpu {width} {jnp.dtype(dtype).name}"
