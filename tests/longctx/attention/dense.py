"""Dense masked softmax attention in the dtype of its inputs: what the operators must equal."""

import jax
import jax.numpy as jnp


def masked_attention(q, k, v, mask, scale=None):
    """`mask` is bool [B, H, T, S]; a row that sees nothing gives 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    s = jnp.where(mask, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    p = jnp.exp(jnp.where(mask, s - jnp.where(jnp.isinf(top), 0.0, top), -jnp.inf))
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bhts,bshe->bthe", p, v, precision="highest")
