"""The definition of lightning attention: the recurrence, one token at a time, in float32 or wider.

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T        o_t = q_t S_t

with S = 0 before the first token of each packed document.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.lightning_attention.tiles import Spec, state_dtype


def unsupported(spec: Spec) -> str | None:
    """Serve every call."""
    del spec
    return None


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Outputs and final state; plain JAX, so that autodiff gives the gradients' definition."""
    del tiles
    wide = state_dtype(q.dtype)
    B, T, H, D = q.shape
    if state is None:
        state = jnp.zeros((B, H, D, v.shape[-1]), wide)
    if doc_start is None:
        doc_start = jnp.full((B, T), -1, jnp.int32)
    axes = varying_axes(q, k, v, log_decay, state, doc_start)
    state, decay = unify_varying((state.astype(wide), jnp.exp(log_decay.astype(wide))), axes)

    def step(S, token):
        t, start, q, k, v = token
        S = jnp.where((start == t)[:, None, None, None], 0, S)
        S = decay[None, :, None, None] * S + k[..., :, None] * v[..., None, :]
        return S, jnp.einsum("bhd,bhde->bhe", q, S, precision=lax.Precision.HIGHEST)

    time_first = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v)]
    tokens = (jnp.arange(T, dtype=jnp.int32), doc_start.T, *time_first)
    state, o = _scan(step, state, tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def _scan(step: Callable, state: Array, tokens: Sequence[Array]) -> tuple[Array, Array]:
    """`lax.scan` in runs of up to sqrt(T) tokens; gradients keep a state of each, not all T."""
    length = len(tokens[0])
    size = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    runs = [x.reshape(-1, size, *x.shape[1:]) for x in tokens]
    run = jax.checkpoint(lambda state, tokens: lax.scan(step, state, tokens))
    state, o = lax.scan(run, state, runs)
    return state, o.reshape(length, *o.shape[2:])


def final_state(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: None = None,
) -> Float[Array, "B H D E"]:
    """The state after the last token."""
    return fwd(jnp.zeros_like(k), k, v, log_decay, state, doc_start, tiles=tiles)[1]


def initial_cotangent(
    q: Float[Array, "B T H D"],
    do: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: None = None,
) -> Float[Array, "B H D E"]:
    """What `do` sends to the initial state."""
    do = do.astype(state_dtype(q.dtype))
    B, _, H, D = q.shape

    def outputs(state):
        return fwd(q, jnp.zeros_like(q), do, log_decay, state, doc_start, tiles=tiles)[0]

    state = jnp.zeros((B, H, D, do.shape[-1]), do.dtype)
    state = unify_varying(state, varying_axes(q, do, log_decay, doc_start))
    return jax.vjp(outputs, state)[1](do)[0]
