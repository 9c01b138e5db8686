"""Attention with tied queries and keys: dense, hash-sparse and with dropped queries and keys."""

import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from longctx.attention.coded_cache import (
    DROPPED_KEY,
    DROPPED_QUERY,
    coded_cache_attention,
    drop_codes,
)
from longctx.attention.slots import append, held
from longctx.attention.sparse import (
    hash_matrix,
    hash_rows,
    hash_sparse_attention,
    overflow,
    qk_sparse_attention,
)
from longctx.nn.cache import Cache, check_cached_call, tokens_to_append
from longctx.nn.draw import new_draw
from longctx.nn.linear import INIT_STD, Linear
from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.parallel.mesh import sequence_axis, shard_operator
from pallas_kernels.flash_attention import flash_attention

type KeyNorm = Literal["head", "all"]


class TiedAttention(nnx.Module):
    """Causal attention whose keys are its normalised queries: the models of arXiv 2306.01160.

    q, v = x W;  k = q / norm(q);  y = softmax(q k^T / sqrt(D)) v Wo over the tokens up to each one.
    Signature and modes are those of `LightningAttention`.

    Args:
      width: of the model, M.
      num_heads: H heads of `head_dim` features.
      key_norm: "head" normalises each head's query on its own, as the sparse models do; "all"
        normalises all heads together, as the authors' released baseline does, which makes its
        scores smaller by sqrt(H).
    """

    in_place = True  # its cache may be of `LayerSlots`
    strict = False  # whether a token does not see itself

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        key_norm: KeyNorm = "head",
        std: float = INIT_STD,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axes: Axes = DEFAULT_AXES,
        rngs: nnx.Rngs,
    ):
        if key_norm not in ("head", "all"):
            raise ValueError(f"{key_norm=} must be 'head' or 'all'")
        self.num_heads, self.head_dim, self.key_norm = num_heads, head_dim, key_norm
        self.axes, self.dtype = axes, dtype
        kwargs = {
            "axes": axes,
            "std": std,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        inner = num_heads * head_dim
        spread = (axes.fsdp, None, axes.tensor)
        self.query_value = Linear(width, (2, inner), spec=spread, **kwargs)
        self.output = Linear(inner, width, spec=(axes.tensor, axes.fsdp), **kwargs)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """A cache without tokens: keys, values and the code of each key."""
        shape = (batch, max_length, self.num_heads)
        rows = jnp.zeros((*shape, self.head_dim), self.dtype)
        return Cache(jnp.zeros(batch, jnp.int32), (rows, rows, jnp.zeros(shape, jnp.int32)))

    def __call__(
        self,
        x: Float[Array, "B T M"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        doc_start: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """Mix tokens. `positions` mean nothing here: positions are the model's to encode."""
        del positions  # part of the signature all mixers share
        check_cached_call(x, cache, lengths, doc_start)
        devices, _ = sequence_axis(self.axes.seq)
        if devices > 1:
            raise NotImplementedError(
                f"{type(self).__name__} orders the tokens of whole sequences, and axis "
                f"{self.axes.seq!r} splits them over {devices} devices: use a mesh with seq=1"
            )
        B, T, _ = x.shape
        q, v = jnp.split(self.query_value(x), 2, axis=-2)
        q, v = (y.reshape(B, T, self.num_heads, self.head_dim) for y in (q, v))
        k = self._keys(q)
        if cache is None:
            o = self._attend(q, k, v, doc_start)
        else:
            new = tokens_to_append(x, lengths, cache.memory[0], self.axes.seq)
            q_codes, k_codes = self._codes(q, cache.length)
            memory = tuple(
                append(memory, x, cache.length, new)
                for memory, x in zip(cache.memory, (k, v, k_codes), strict=True)
            )
            o = self._attend_cached(q, q_codes, tuple(map(held, memory)), cache.length)
            cache = cache.advance(memory, new)
        return self.output(o.reshape(B, T, -1)), cache

    def _keys(self, q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        axes = -1 if self.key_norm == "head" else (-2, -1)
        wide = q.astype(jnp.float32)
        square = jnp.sum(wide * wide, axis=axes, keepdims=True)
        return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-12))).astype(q.dtype)

    def _codes(
        self, q: Float[Array, "B T H D"], start: Int[Array, "B"]
    ) -> tuple[Int[Array, "B T H"], Int[Array, "B T H"]]:
        """A code for each query and each key; a query sees the keys of its code."""
        codes = jnp.zeros(q.shape[:3], jnp.int32)
        return codes, codes

    def _attend(self, q: Array, k: Array, v: Array, doc_start: Array | None) -> Array:
        def operator(q: Array, k: Array, v: Array, doc_start: Array | None) -> Array:
            lo = None if doc_start is None else jnp.maximum(doc_start, 0)
            return cast(Array, flash_attention(q, k, v, lo=lo))

        return self._sharded(operator, (), q, k, v, doc_start)

    def _sharded(self, operator, codes_like, q, k, v, doc_start):
        """`operator(q, k, v, doc_start, *codes_like)` on every device's batch and heads."""
        batch, heads = self.axes.batch, self.axes.tensor
        wide, narrow = P(batch, None, heads, None), P(batch, None, heads)
        specs = (wide, wide, wide, P(batch, None), *(narrow for _ in codes_like))
        return shard_operator(operator, specs, wide)(q, k, v, doc_start, *codes_like)

    def _attend_cached(self, q, q_codes, memory, start):
        def operator(q, keys, values, q_codes, k_codes, start):
            return coded_cache_attention(
                q, keys, values, q_codes, k_codes, start, strict=self.strict
            )

        batch, heads = self.axes.batch, self.axes.tensor
        wide, narrow = P(batch, None, heads, None), P(batch, None, heads)
        specs = (wide, wide, wide, narrow, narrow, P(batch))
        keys, values, k_codes = memory
        return shard_operator(operator, specs, wide)(q, keys, values, q_codes, k_codes, start)


class HashAttention(TiedAttention):
    """Tied attention to the earlier tokens of the same hash bucket (arXiv 2306.01160).

    Strict as published: a token does not see itself, the first of a bucket gives 0. The random
    directions are drawn from the module's `Draw`, so that rematerialisation and decoding see the
    same buckets; `redraw` between training steps draws others, as published.

    Args:
      num_buckets: even; the paper's 16 at 8192 tokens is 512 tokens a bucket.
      others: of `TiedAttention`.
    """

    strict = True

    def __init__(self, width: int, num_heads: int, head_dim: int, *, num_buckets: int, **kwargs):
        super().__init__(width, num_heads, head_dim, **kwargs)
        self.num_buckets = num_buckets
        self.draw = new_draw(kwargs["rngs"])

    def _codes(self, q, start):
        key = jax.random.wrap_key_data(self.draw[...])
        matrix = hash_matrix(key, self.num_heads, self.head_dim, self.num_buckets)
        codes = hash_rows(q, matrix)
        return codes, codes

    def _attend(self, q, k, v, doc_start):
        def operator(q, k, v, doc_start, hashes):
            return hash_sparse_attention(
                q, k, v, num_buckets=self.num_buckets, hashes=hashes, doc_start=doc_start
            )

        return self._sharded(operator, self._codes(q, None)[:1], q, k, v, doc_start)


class DropAttention(TiedAttention):
    """Tied attention between random kept queries and random kept keys (arXiv 2306.01160).

    Queries and keys are dropped independently, per head and token; a dropped query gives 0. The
    masks come from the module's `Draw`, the position and the row's place in the batch, so that a
    longer sequence draws the same masks for its beginning, and decoding those of the full pass;
    `redraw` between training steps draws others, as published, also in evaluation.

    Capacities are six standard deviations above the mean of what is kept; beyond them, which one
    head in 10^9 reaches, the latest tokens are dropped too: `overflow` counts them.

    Args:
      drop: probability of dropping a query, or a key.
      others: of `TiedAttention`.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, *, drop: float, **kwargs):
        if not 0 <= drop < 1:
            raise ValueError(f"{drop=} must be in [0, 1)")
        super().__init__(width, num_heads, head_dim, **kwargs)
        self.drop = drop
        self.draw = new_draw(kwargs["rngs"])

    def _keep(
        self, batch: int, length: int, start: Int[Array, "B"]
    ) -> tuple[Bool[Array, "B T H"], Bool[Array, "B T H"]]:
        """Which queries and which keys at positions start[b] + t are kept."""
        key = jax.random.wrap_key_data(self.draw[...])

        def one(row: Int[Array, ""], position: Int[Array, ""]) -> Float[Array, "2 H"]:
            at = jax.random.fold_in(jax.random.fold_in(key, position), row)
            return jax.random.uniform(at, (2, self.num_heads))

        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        draws = jax.vmap(jax.vmap(one, (None, 0)))(jnp.arange(batch), positions)
        keep = draws >= self.drop
        return keep[:, :, 0], keep[:, :, 1]

    def _codes(self, q, start):
        keep_q, keep_k = self._keep(q.shape[0], q.shape[1], start)
        return drop_codes(keep_q, DROPPED_QUERY), drop_codes(keep_k, DROPPED_KEY)

    def _attend(self, q, k, v, doc_start):
        batch, length = q.shape[:2]
        capacity = self.capacity(length)

        def operator(q, k, v, doc_start, keep_q, keep_k):
            sizes = {"capacity_q": capacity, "capacity_k": capacity}
            return qk_sparse_attention(q, k, v, keep_q, keep_k, doc_start=doc_start, **sizes)

        keep = self._keep(batch, length, jnp.zeros(batch, jnp.int32))
        return self._sharded(operator, keep, q, k, v, doc_start)

    def capacity(self, length: int) -> int:
        """Queries, and keys, of a head that a full pass over `length` tokens has room for."""
        spread = 6 * math.sqrt(length * self.drop * (1 - self.drop))
        return min(length, math.ceil((1 - self.drop) * length + spread))

    def overflow(self, batch: int, length: int) -> Int[Array, "2 B H"]:
        """How many kept queries, and keys, a full pass drops after all for want of capacity."""
        keep = self._keep(batch, length, jnp.zeros(batch, jnp.int32))
        return jnp.stack([overflow(rows, self.capacity(length)) for rows in keep])
