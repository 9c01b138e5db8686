"""Softmax self-attention as a module."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.attention.decode import decode_attention
from longctx.attention.rotary import rope
from longctx.attention.slots import append, held
from longctx.nn.cache import Cache, check_cached_call, tokens_to_append
from longctx.nn.linear import INIT_STD, Linear
from longctx.nn.norm import RMSNorm
from longctx.nn.position import NO_SCALING, RopeScaling, default_positions, rope_frequencies
from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.parallel.context import Strategy, context_attention
from longctx.parallel.layout import Kind, Layout
from longctx.parallel.placement import place


class SelfAttention(nnx.Module):
    """Causal multi-head attention with grouped key/value heads, RoPE, QK-norm and a window.

    y = softmax(q k^T / sqrt(D)) v Wo over the tokens that each token sees; query head h reads
    key/value head h // (H // K). Signature and modes are those of `LightningAttention`: called on
    [B, T, M] it returns (y, cache); the cache holds keys and values of up to `max_length` tokens.

    Args:
      width: of the model, M.
      num_heads: H query heads of `head_dim` features.
      num_kv_heads: K, a divisor of H (2305.13245); None: H.
      rope_base: of the rotary frequencies; None: no rotation.
      rope_fraction: share of each head's features that is rotated (MiniMax-01: 0.5).
      rope_scaling: stretches the frequencies for longer contexts.
      qk_norm: RMSNorm with weight on each head's q and k, before the rotation (2302.05442).
      window: how many tokens, itself included, a token sees; None: all.
      strategy, head_groups: how devices along `axes.seq` cooperate: `context_attention`.
      layout: order of the tokens along `axes.seq`; positions must be given unless contiguous.
    """

    in_place = True  # its cache may be of `LayerSlots`

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        rope_base: float | None = 10000.0,
        rope_fraction: float = 1.0,
        rope_scaling: RopeScaling = NO_SCALING,
        qk_norm: bool = False,
        window: int | None = None,
        norm_eps: float = 1e-6,
        strategy: Strategy = "auto",
        head_groups: int = 1,
        layout: Layout | Kind = "contiguous",
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axes: Axes = DEFAULT_AXES,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} must divide {num_heads=}")
        rotated = round(head_dim * rope_fraction)
        if rope_base is not None and (rotated % 2 or not 0 < rotated <= head_dim):
            raise ValueError(f"{rope_fraction=} of {head_dim=} must be an even number of features")
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.window, self.axes, self.dtype = window, axes, dtype
        self.strategy, self.head_groups, self.layout = strategy, head_groups, layout
        self.cache_spec = P(axes.batch, axes.seq, axes.tensor, None)
        self.rope_base, self.rotated, self.rope_scaling = rope_base, rotated, rope_scaling
        kwargs = {
            "axes": axes,
            "std": std,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        spread = (axes.fsdp, None, axes.tensor)
        self.query = Linear(width, (1, num_heads * head_dim), spec=spread, **kwargs)
        self.key_value = Linear(width, (2, kv_heads * head_dim), spec=spread, **kwargs)
        self.output = Linear(num_heads * head_dim, width, spec=(axes.tensor, axes.fsdp), **kwargs)
        norm = {"param_dtype": param_dtype, "rngs": rngs}
        self.query_norm = RMSNorm(head_dim, norm_eps, **norm) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, norm_eps, **norm) if qk_norm else None

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """A cache without tokens that can hold `max_length` per row."""
        shape = (batch, max_length, self.kv_heads, self.head_dim)
        memory = (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        return Cache(jnp.zeros(batch, jnp.int32), memory)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        doc_start: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """Mix tokens; `positions` (default: counted from each document's start) serve RoPE."""
        check_cached_call(x, cache, lengths, doc_start)
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if self.rope_base is not None:
            if positions is None:
                positions = default_positions(
                    T, doc_start=doc_start, cache=cache, layout=self.layout, axis=self.axes.seq
                )
            frequencies = rope_frequencies(self.rotated, self.rope_base, self.rope_scaling)
            q, k = rope(positions, frequencies, q, k)
        if cache is None:
            attention = context_attention(
                q,
                k,
                v,
                strategy=self.strategy,
                head_groups=self.head_groups,
                layout=self.layout,
                window=self.window,
                doc_start=doc_start,
                **self.axes.operator,
            )
            o = cast(Array, attention)  # not (o, lse), since that was not asked for
        else:
            start = cache.length
            new = tokens_to_append(x, lengths, cache.memory[0], self.axes.seq)
            memory = tuple(
                append(memory, x, start, new)
                for memory, x in zip(cache.memory, (k, v), strict=True)
            )
            keys, values = (place(held(x), self.cache_spec) for x in memory)
            o = decode_attention(q, keys, values, start, window=self.window, **self.axes.operator)
            cache = cache.advance(memory, new)
        return self.output(o.reshape(B, T, -1)), cache

    def project(
        self, x: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values by head: normalised if the module does that, not rotated."""
        B, T, _ = x.shape
        kv = self.key_value(x)
        q = self.query(x).reshape(B, T, self.num_heads, self.head_dim)
        k, v = (kv[..., i, :].reshape(B, T, self.kv_heads, self.head_dim) for i in range(2))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v


RingAttention = functools.partial(SelfAttention, strategy="ring")
