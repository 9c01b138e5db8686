"""What a flash attention call is (`Spec`) and the tile sizes it may be computed with (`Tiles`)."""

import dataclasses

import jax.numpy as jnp


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
    out_dtype: jnp.dtype
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
