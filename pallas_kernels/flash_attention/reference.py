"""Softmax attention over key intervals, as it is defined: dense, float32 or float64."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.intervals import row_limits
from pallas_kernels.flash_attention.pieces import whole
from pallas_kernels.flash_attention.tiles import Spec, Tiles


def unsupported(spec: Spec) -> str | None:
    """Nothing is: the definition serves every call, with memory quadratic in the length."""
    return None


def scores(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], spec: Spec) -> Array:
    """Scaled and capped scores `[B, H, T, S]`, not yet masked."""
    k = jnp.repeat(k.astype(spec.wide), spec.group, axis=2)
    s = spec.scale * jnp.einsum("bthd,bshd->bhts", q.astype(spec.wide), k, precision="highest")
    return s if spec.soft_cap is None else spec.soft_cap * jnp.tanh(s / spec.soft_cap)


def visible(lo: Array | None, hi: Array | None, spec: Spec) -> Array:
    """Whether row t sees key s: bool `[b, h, T, S]`."""
    rows = jnp.arange(spec.q_length, dtype=jnp.int32)[None, None]
    keys = jnp.arange(spec.kv_length, dtype=jnp.int32)[None, None, None]
    low, high = row_limits(spec, rows, lo, hi)
    return (low[..., None] <= keys) & (keys < high[..., None])


def mix(p: Float[Array, "B H T S"], v: Float[Array, "B S K E"], spec: Spec) -> Array:
    """The values `[B, T, H, E]` weighted by `p`."""
    v = jnp.repeat(v.astype(p.dtype), spec.group, axis=2)
    return jnp.einsum("bhts,bshe->bthe", p, v, precision="highest")


def merge(
    o1: Float[Array, "B T H E"],
    lse1: Float[Array, "B H T"],
    o2: Float[Array, "B T H E"],
    lse2: Float[Array, "B H T"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

    lse = log(exp(lse1) + exp(lse2)), o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2, in float32.
    Rows that see no key in one set (lse -inf, o 0) or in both pass through; differentiable
    everywhere. Equation: arXiv 2310.01889, section 3; also 2205.14135, algorithm 1.
    """
    m = jax.lax.stop_gradient(jnp.maximum(lse1, lse2))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    w1, w2 = jnp.exp(lse1 - m), jnp.exp(lse2 - m)
    total = w1 + w2
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    a, b = (jnp.swapaxes(w / total, 1, 2)[..., None] for w in (w1, w2))
    return (
        a * o1.astype(a.dtype) + b * o2.astype(b.dtype),
        jnp.where(empty, -jnp.inf, m + jnp.log(total)),
    )


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    lo: Int[Array, "B h T"] | None,
    hi: Int[Array, "B h T"] | None,
    spec: Spec,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """o_t = sum_s exp(s_ts - lse_t) v_s and lse_t = log sum_s exp(s_ts) over the visible s."""
    s = jnp.where(visible(lo, hi, spec), scores(q, k, spec), -jnp.inf)
    empty = s.max(-1, keepdims=True) == -jnp.inf
    lse = jax.nn.logsumexp(jnp.where(empty, 0.0, s), axis=-1, keepdims=True)
    p = jnp.where(empty, 0.0, jnp.exp(s - lse))
    return mix(p, v, spec), jnp.where(empty, -jnp.inf, lse)[..., 0]


def fwd(q, k, v, lo, hi, carry, *, spec: Spec, tiles: Tiles | None = None):
    """See `xla.fwd`."""
    del tiles
    q, k, v, carry = whole(q, k, v, carry, spec)
    o, lse = attention(q, k, v, lo, hi, spec)
    if carry is not None:
        before, lse_before = carry
        o, lse = merge(before, lse_before, o, lse)
    return o.astype(spec.out_dtype), lse


def bwd(q, k, v, lo, hi, do, lse, delta, accumulate, *, spec: Spec, tiles: Tiles | None = None):
    """See `xla.bwd`."""
    del tiles
    q, k, v, do = (x.astype(spec.wide) for x in (q, k, v, do))
    s, to_q_and_k = jax.vjp(lambda q, k: scores(q, k, spec), q, k)
    p = jnp.exp(jnp.where(visible(lo, hi, spec), s - lse[..., None], -jnp.inf))
    _, to_p_and_v = jax.vjp(lambda p, v: mix(p, v, spec), p, v)
    dp, dv = to_p_and_v(do)
    gradients = (*to_q_and_k(p * (dp - delta[..., None])), dv)
    return tuple(
        g.astype(spec.out_dtype) if a is None else a + g.astype(a.dtype)
        for a, g in zip(accumulate, gradients, strict=True)
    )
