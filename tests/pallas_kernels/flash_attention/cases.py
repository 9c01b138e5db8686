"""What the flash attention tests share: an independent definition, inputs, tolerances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Relative RMS error of values, and of gradients, by input dtype. The dense definition runs in
# float32 on the same rounded inputs.
TOLERANCE = {
    jnp.dtype(jnp.float32): (2e-6, 4e-6),
    jnp.dtype(jnp.float16): (1e-3, 1e-3),
    jnp.dtype(jnp.bfloat16): (5e-3, 5e-3),
}


def definition(
    q, k, v, lo=None, hi=None, *, causal=True, window=None, q_offset=0, scale=None, soft_cap=None
) -> tuple[jax.Array, jax.Array]:
    """Dense (o, lse), with the mask by comparing every pair and the gradients by autodiff."""
    (_, length, heads, width), (_, kv_length, kv_heads, _) = q.shape, k.shape
    t = np.arange(length)[:, None] + q_offset
    s = np.arange(kv_length)[None, :]
    seen = np.ones((length, kv_length), bool)
    if causal:
        seen &= s <= t
    if window is not None:
        seen &= s > t - window
    seen = jnp.asarray(seen)[None, None]
    if lo is not None:
        seen &= (lo if lo.ndim == 3 else lo[:, None])[..., None] <= s[None, None]
    if hi is not None:
        seen &= (hi if hi.ndim == 3 else hi[:, None])[..., None] > s[None, None]
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    scores *= width**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0.0)), 0.0)  # small scores only
    total = weights.sum(-1)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    o = jnp.einsum("bhts,bshe->bthe", weights / total[..., None], v, precision="highest")
    return o, jnp.where(empty, -jnp.inf, jnp.log(total))


def inputs(
    batch=1,
    length=63,
    kv_length=None,
    heads=2,
    kv_heads=None,
    width=16,
    value_width=None,
    dtype: Any = jnp.float32,
    seed=0,
) -> list[jax.Array]:
    """Random q, k and v."""
    kv_length, kv_heads = kv_length or length, kv_heads or heads
    shapes = (
        (batch, length, heads, width),
        (batch, kv_length, kv_heads, width),
        (batch, kv_length, kv_heads, value_width or width),
    )
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def random_intervals(shape: tuple[int, ...], kv_length: int, seed: int = 0):
    """int32 lo and hi: some reach past the keys, some rows are empty, columns have gaps."""
    rng = np.random.default_rng(seed)
    lo = rng.integers(-5, kv_length + 3, shape)
    hi = lo + rng.integers(-4, kv_length // 2, shape)
    lone = rng.random(shape) < 0.1
    hi = np.where(lone, lo + 1, hi)
    everything = rng.random(shape) < 0.1
    lo, hi = np.where(everything, 0, lo), np.where(everything, kv_length, hi)
    return jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)
