"""Tensorized attention as a module."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.attention.slots import append, held
from longctx.attention.tensorized import (
    Dims,
    Order,
    Positions,
    Variant,
    make_hops,
    ring_lengths,
    sharded_mixed_radix,
    tensorized_attention,
    tensorized_cache_attention,
)
from longctx.nn.attention import SelfAttention
from longctx.nn.cache import Cache, check_cached_call, tokens_to_append
from longctx.nn.position import rope_frequencies
from longctx.nn.sharding import parameter
from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import sequence_axis, shard_operator


class TensorizedAttention(SelfAttention):
    """Attention along the dimensions of the folded sequence (arXiv 2410.20926).

    y = tensorized_attention(q, k, v) Wo; projections, RoPE and modes are those of
    `SelfAttention`, whose weights it takes unchanged. The cache holds keys (not rotated), values,
    and for every hop but the first a ring of the values it reads. Where `axes.seq` splits
    sequences, the fast hop exchanges a halo and the slow hops an all-to-all over residues
    (`sharded_mixed_radix` says what must divide what).

    Args:
      width: of the model, M.
      num_heads: H query heads of `head_dim` features.
      dims: of the folded sequence, fast to slow; see `tensorized_attention` for this and for
        `variant`, `order` and `positions`. With n_1 at least the trained length, an imported
        model computes the same as before on its first n_1 tokens.
      self_bias: initial value of the learned score that a token gets with itself in every hop
        but the fastest ("mixed_radix" only); None: no such score.
      layout: order of the tokens along `axes.seq`; only contiguous parts can be computed.
      others: as in `SelfAttention`, without a window or a strategy.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        dims: Dims,
        variant: Variant = "mixed_radix",
        order: Order = "slow_first",
        positions: Positions = "digit",
        self_bias: float | None = 4.0,
        layout: Layout | Kind = "contiguous",
        rngs: nnx.Rngs,
        **others: Any,
    ):
        if variant == "kronecker":
            raise ValueError(f"{variant=} is bidirectional: a decoder cannot use it")
        if unknown := {"window", "strategy", "head_groups"} & set(others):
            raise TypeError(f"TensorizedAttention has no {', '.join(sorted(unknown))}")
        super().__init__(width, num_heads, head_dim, layout=layout, rngs=rngs, **others)
        self.dims, self.variant, self.order, self.positions = dims, variant, order, positions
        biased = self_bias is not None and variant == "mixed_radix" and len(dims) > 1
        self.self_bias = self._make_bias(self_bias, rngs) if biased else None

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """A cache without tokens that can hold `max_length` per row."""
        if self.variant != "mixed_radix":
            raise NotImplementedError(f"variant={self.variant!r} has no decoding; mixed_radix has")

        def rows(length: int, heads: int) -> Array:
            return jnp.zeros((batch, length, heads, self.head_dim), self.dtype)

        rings = ring_lengths(self._hops(max_length), max_length)
        keys, values = (rows(max_length, self.kv_heads) for _ in range(2))
        memory = (keys, values, tuple(rows(length, self.num_heads) for length in rings))
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
        """Mix tokens. `positions` mean nothing here: hops count distances themselves."""
        del positions  # part of the signature all mixers share
        check_cached_call(x, cache, lengths, doc_start)
        devices, inside = sequence_axis(self.axes.seq)
        if not as_layout(self.layout, devices).in_order:
            raise NotImplementedError(
                f"layout={self.layout!r}: TensorizedAttention needs contiguous parts of a sequence"
            )
        if devices > 1 and (cache is not None or self.variant != "mixed_radix"):
            raise NotImplementedError(
                f"axis {self.axes.seq!r} splits sequences over {devices} devices: there "
                "TensorizedAttention computes variant 'mixed_radix' without a cache only"
            )
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if devices > 1:
            o = self._attend_sharded(q, k, v, doc_start, T * devices if inside else T)
        elif cache is None:
            o = self._attend(q, k, v, doc_start)
        else:
            new = tokens_to_append(x, lengths, cache.memory[0], self.axes.seq)
            *memory, rings = cache.memory
            memory = [append(m, x, cache.length, new) for m, x in zip(memory, (k, v), strict=True)]
            keys, values, *rings = map(held, (*memory, *rings))
            o, rings = self._attend_cached(q, keys, values, tuple(rings), cache.length, new)
            cache = cache.advance((*memory, rings), new)
        return self.output(o.reshape(B, T, -1)), cache

    def _make_bias(self, value: float, rngs: nnx.Rngs) -> nnx.Param[Array]:
        initial = jax.nn.initializers.constant(value)
        shape = (len(self.dims) - 1, self.num_heads)
        return parameter(initial, shape, jnp.float32, (None, self.axes.tensor), rngs)

    def _frequencies(self) -> Float[Array, "D/2"] | None:
        if self.rope_base is None:
            return None
        return rope_frequencies(self.rotated, self.rope_base, self.rope_scaling)

    def _bias(self) -> Float[Array, "L H"] | None:
        return None if self.self_bias is None else self.self_bias[...]

    def _hops(self, length: int):
        scale = 1 / math.sqrt(self.head_dim)
        return make_hops(self.dims, length, self.order, self.positions, scale, "auto")

    def _attend(self, q, k, v, doc_start):
        order = self.order if self.variant in ("mixed_radix", "dominance") else None

        def operator(q, k, v, doc_start, bias, frequencies):
            return tensorized_attention(
                q,
                k,
                v,
                dims=self.dims,
                variant=self.variant,
                order=order,
                positions=self.positions,
                frequencies=frequencies,
                self_bias=bias,
                doc_start=doc_start,
            )

        heads, bias, row = self._specs()
        specs = (heads, heads, heads, row, bias, P(None))
        args = (q, k, v, doc_start, self._bias(), self._frequencies())
        return shard_operator(operator, specs, heads)(*args)

    def _attend_sharded(self, q, k, v, doc_start, length):
        hops, axis = self._hops(length), self.axes.seq
        assert axis is not None  # since it splits the sequence

        def operator(q, k, v, doc_start, bias, frequencies):
            return sharded_mixed_radix(
                q,
                k,
                v,
                hops=hops,
                axis=axis,
                frequencies=frequencies,
                self_bias=bias,
                doc_start=doc_start,
            )

        rows = P(self.axes.batch, axis, self.axes.tensor, None)
        specs = (rows, rows, rows, P(self.axes.batch, axis), self._specs()[1], P(None))
        args = (q, k, v, doc_start, self._bias(), self._frequencies())
        return shard_operator(operator, specs, rows)(*args)

    def _attend_cached(self, q, keys, values, rings, start, new):
        hops = self._hops(keys.shape[1])

        def operator(q, keys, values, rings, start, new, bias, frequencies):
            return tensorized_cache_attention(
                q,
                keys,
                values,
                rings,
                start,
                new,
                hops=hops,
                self_bias=bias,
                frequencies=frequencies,
            )

        heads, bias, _ = self._specs()
        batch = P(self.axes.batch)
        specs = (heads, heads, heads, heads, batch, batch, bias, P(None))
        args = (q, keys, values, rings, start, new, self._bias(), self._frequencies())
        return shard_operator(operator, specs, (heads, heads))(*args)

    def _specs(self) -> tuple[P, P, P]:
        """Of [B, T, H, D], of [L, H] and of [B, T]."""
        batch, heads = self.axes.batch, self.axes.tensor
        return P(batch, None, heads, None), P(None, heads), P(batch, None)
