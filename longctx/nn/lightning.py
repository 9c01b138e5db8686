"""The gated linear attention of TransNormerLLM as a module."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.nn.cache import Cache, check_cached_call
from longctx.nn.linear import INIT_STD, Linear
from longctx.nn.mlp import Activation, activation_function
from longctx.nn.norm import NormKind, make_norm
from longctx.nn.position import LRPE, default_positions
from longctx.nn.sharding import DEFAULT_AXES, Axes, split_over
from longctx.parallel.lasp import Exchange, context_lightning
from longctx.parallel.layout import Kind, Layout
from longctx.parallel.mesh import shard_operator
from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_state,
    lightning_step,
)

type Gate = Literal["linear", "sigmoid", "off"]


class Constant(nnx.Variable):
    """An array that belongs to a module but is not trained."""


class LightningAttention(nnx.Module):
    """Gated linear attention with one decay per head.

    q, k, v, u = x W;  o_t = sum_{s <= t} exp(log_decay (t - s)) (act(q_t) . act(k_s)) v_s;
    y = (norm(o) * gate(u)) Wo, where the norm runs over all heads together. With `lrpe`, q and k
    get learnable rotations (LRPE-d). Source: 2307.14995 section 3, 2405.17381.

    Called on [B, T, M] it returns (y, cache):

    * training: `cache` None; `doc_start` separates packed documents.
    * prefill: `cache` from `init_cache`, or of an earlier call, is continued by T tokens. With
      `lengths` [B], row b continues by its first lengths[b] tokens and the rest is padding,
      whose outputs mean nothing.
    * decode: the same with T = 1; constant memory and time per token.

    Args:
      width: of the model, M.
      num_heads: H; q, k, v have `head_dim` features per head, whatever `width` is.
      log_decay: [H], at most 0, fixed during training; None: no decay.
      lrpe: encode positions in q and k, which doubles their width inside the operator.
      activation: of q and k; `value_activation` of v (the paper: none; MiniMax-01: silu).
      gate: "linear" (the paper's), "sigmoid" (MiniMax-01's) or "off".
      strategy: how devices along `axes.seq` exchange states: `context_lightning`.
      layout: order of the tokens along `axes.seq`; positions must be given unless contiguous.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        log_decay: Float[Array, "H"] | None = None,
        lrpe: bool = False,
        activation: Activation = "silu",
        value_activation: Activation = "none",
        gate: Gate = "linear",
        norm: NormKind = "srms",
        norm_eps: float = 1e-6,
        strategy: Exchange = "all_gather",
        layout: Layout | Kind = "contiguous",
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axes: Axes = DEFAULT_AXES,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.axes = num_heads, head_dim, axes
        self.strategy, self.layout = strategy, layout
        self.activation = activation_function(activation)
        self.value_activation = activation_function(value_activation)
        self.gate = _gate_function(gate)
        inner = num_heads * head_dim
        kwargs = {
            "axes": axes,
            "std": std,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        parts = 3 if self.gate is None else 4
        self.project = Linear(width, (parts, inner), spec=(axes.fsdp, None, axes.tensor), **kwargs)
        self.output = Linear(inner, width, spec=(axes.tensor, axes.fsdp), **kwargs)
        self.norm = make_norm(norm, inner, norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.lrpe = LRPE(num_heads, head_dim, axis=axes.tensor, rngs=rngs) if lrpe else None
        if log_decay is None:
            log_decay = jnp.zeros(num_heads, jnp.float32)
        if log_decay.shape != (num_heads,):
            raise ValueError(f"log_decay.shape={log_decay.shape} must be ({num_heads},)")
        self.log_decay = Constant(log_decay, **split_over((axes.tensor,)))

    def init_cache(self, batch: int, max_length: int = 0) -> Cache:
        """A cache without tokens; its size does not depend on `max_length`."""
        del max_length  # part of the signature all mixers share
        width = self.head_dim * (2 if self.lrpe else 1)
        state = jnp.zeros((batch, self.num_heads, width, self.head_dim), jnp.float32)
        return Cache(jnp.zeros(batch, jnp.int32), state)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        doc_start: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """Mix tokens; `positions` (default: counted from each document's start) serve `lrpe`.

        With a cache all T tokens are on every device, also inside a shard_map along the sequence.
        """
        check_cached_call(x, cache, lengths, doc_start)
        B, T, _ = x.shape
        parts = self.project(x)
        q, k, v = (parts[..., i, :].reshape(B, T, self.num_heads, -1) for i in range(3))
        q, k, v = self.activation(q), self.activation(k), self.value_activation(v)
        if self.lrpe is not None:
            if positions is None:
                positions = default_positions(
                    T, doc_start=doc_start, cache=cache, layout=self.layout, axis=self.axes.seq
                )
            q, k = self.lrpe(positions, q, k)
        if cache is None:
            o = context_lightning(
                q,
                k,
                v,
                jax.lax.stop_gradient(self.log_decay[...]),
                strategy=self.strategy,
                layout=self.layout,
                doc_start=doc_start,
                **self.axes.operator,
            )
        else:
            o, state = self._continue(q, k, v, cache.memory, lengths)
            cache = cache.advance(state, T if lengths is None else lengths)
        o = self.norm(o.reshape(B, T, -1))
        if self.gate is not None:
            o = o * self.gate(parts[..., 3, :])
        return self.output(o), cache

    def _continue(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H E"],
        state: Float[Array, "B H D E"],
        lengths: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
        """Outputs and state after the new tokens, on each device's rows and heads."""
        if lengths is not None:
            operator = _ragged_prefill
        else:
            operator = _decode if q.shape[1] == 1 else _prefill
        batch, heads = self.axes.batch, self.axes.tensor
        rows, states = P(batch, None, heads, None), P(batch, heads, None, None)
        specs = (rows, rows, rows, P(heads), states, P(batch))
        sharded = shard_operator(operator, specs, (rows, states))
        return sharded(q, k, v, self.log_decay[...], state, lengths)


def _gate_function(gate: Gate) -> Callable[[Array], Array] | None:
    match gate:
        case "linear":
            return lambda u: u
        case "sigmoid":
            return jax.nn.sigmoid
        case "off":
            return None
    raise ValueError(f"{gate=} must be 'linear', 'sigmoid' or 'off'")


def _prefill(q, k, v, log_decay, state, _):
    return lightning_attention(q, k, v, log_decay, state=state, return_state=True)


def _ragged_prefill(q, k, v, log_decay, state, lengths):
    """The state after the first lengths[b] tokens: that of the row shifted until it ends there."""
    T = k.shape[1]
    source = jnp.arange(T)[None] - (T - lengths)[:, None]
    shift = jnp.maximum(source, 0)[:, :, None, None]
    first = jnp.broadcast_to((T - lengths)[:, None], source.shape)
    k_end, v_end = (jnp.take_along_axis(x, shift, axis=1) for x in (k, v))
    new = lightning_state(k_end, v_end, log_decay, doc_start=first)
    kept = jnp.exp(lengths[:, None].astype(jnp.float32) * log_decay[None])[:, :, None, None]
    has_tokens = (lengths > 0)[:, None, None, None]
    o = lightning_attention(q, k, v, log_decay, state=state)
    return o, kept * state + jnp.where(has_tokens, new, 0)


def _decode(q, k, v, log_decay, state, _):
    o, state = lightning_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)
    return o[:, None], state
