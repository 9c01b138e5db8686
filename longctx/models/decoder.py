"""A decoder-only language model built from a `ModelConfig`."""

import functools
import math
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.models.config import ModelConfig, ParallelConfig, periods
from longctx.nn.attention import SelfAttention
from longctx.nn.cache import Cache
from longctx.nn.lightning import LightningAttention
from longctx.nn.linear import Embedding
from longctx.nn.mlp import GLU, MLP
from longctx.nn.norm import make_norm
from longctx.nn.position import default_positions
from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.nn.sparse import DropAttention, HashAttention, TiedAttention
from longctx.nn.stack import Block, Mixer, Segment, Stack
from longctx.nn.tensorized import TensorizedAttention
from longctx.parallel.placement import place, placed_by_xla, spread
from pallas_kernels.lightning_attention import alibi_log_decay, printed_log_decay

ONE_DEVICE = ParallelConfig()


class Decoder(nnx.Module):
    """Tokens to hidden vectors to logits; see `ModelConfig` for what it is made of."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        axes: Axes = DEFAULT_AXES,
        parallel: ParallelConfig = ONE_DEVICE,
        rngs: nnx.Rngs,
    ):
        axes = axes.with_parameters_over_seq() if parallel.fsdp_over_seq else axes
        self.config, self.axes, self.parallel = config, axes, parallel
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        embed = functools.partial(
            Embedding,
            width=config.width,
            axes=axes,
            std=config.init_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.embedding = embed(config.vocab_size)
        self.untied_head = None if config.tied_head else embed(config.vocab_size)
        rows = config.learned_positions
        self.position_table = embed(rows) if rows else None
        self.stack = Stack(
            [
                Segment(tuple(functools.partial(make_block, self, kind) for kind in kinds), repeats)
                for kinds, repeats in periods(config.layer_kinds())
            ],
            remat=config.remat,
            unroll=config.unroll,
            gather=parallel.gather,
            rngs=rngs,
        )
        self.final_norm = make_norm(
            config.norm, config.width, config.norm_eps, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        doc_start: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
    ) -> Float[Array, "B T M"]:
        """Hidden vectors after the final norm.

        Args:
          tokens: in [0, vocab_size).
          doc_start: position in the row of the first token of each token's document, for packed
            rows; None: each row is one document.
          positions: of each token in its document; counted from `doc_start` by default, and
            needed when the tokens are not in the order of their positions (zigzag).

        Raises:
          ValueError: T exceeds the learned position table; or positions are needed.
        """
        self.config.check_length(tokens.shape[1])
        return self._hidden(tokens, None, positions, doc_start=doc_start)[0]

    def head(self) -> Float[Array, "V M"]:
        """The output embedding, in the parameters' dtype."""
        return (self.untied_head or self.embedding).table[...]

    def logits(self, hidden: Float[Array, "B *T M"]) -> Float[Array, "B *T V"]:
        """Logits in float32."""
        product = functools.partial(jnp.einsum, "...m,vm->...v", preferred_element_type=jnp.float32)
        split = P(*self.axes.rows(hidden.ndim - 1), self.axes.tensor)
        return placed_by_xla(product, hidden, self.head().astype(hidden.dtype), split=split)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """A cache for `batch` rows of up to `max_length` tokens, prompt and decoded ones.

        Raises:
          ValueError: `max_length` exceeds the learned position table.
        """
        self.config.check_length(max_length, "max_length")
        return self.stack.init_cache(batch, max_length)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Continue each row by its first lengths[b] tokens (all T if None).

        Returns:
          the logits after each row's last token, and the cache. Each row gets what it would get
          alone (but for `DropAttention`, which draws by the row's place), whatever stands in the
          padding.
        """
        hidden, new = self._hidden(tokens, cache, None, lengths=lengths)
        if lengths is None:
            last = placed_by_xla(lambda x: x[:, -1], hidden, split=P(self.axes.batch))
        else:
            take = functools.partial(jnp.take_along_axis, axis=1)
            index = (lengths - 1)[:, None, None]
            last = placed_by_xla(take, hidden, index, split=P(self.axes.batch))[:, 0]
        return self.logits(last), new

    def decode(self, token: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Continue each row by one token; returns the logits after it, and the cache."""
        return self.prefill(token[:, None], None, cache)

    def _hidden(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None,
        positions: Int[Array, "#B T"] | None,
        *,
        doc_start: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        if positions is None:
            positions = default_positions(
                tokens.shape[1],
                doc_start=doc_start,
                cache=cache,
                layout=self.parallel.token_layout,
                axis=self.axes.seq,
            )
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.width)
        if self.position_table is not None:
            x = x + spread(self.position_table(positions), x)
        x = place(x, self.axes.hidden)
        x, cache = self.stack(x, cache, positions=positions, doc_start=doc_start, lengths=lengths)
        return self.final_norm(x), cache


def make_block(model: Decoder, kind: str, layer: Int[Array, ""], rngs: nnx.Rngs) -> Block:
    """One layer of `model`, of the given kind; `layer` is its index, traced."""
    c, axes = model.config, model.axes
    shared = {
        "std": c.init_std,
        "dtype": jnp.dtype(c.dtype),
        "param_dtype": jnp.dtype(c.param_dtype),
        "axes": axes,
        "rngs": rngs,
    }
    mixer = make_mixer(model, kind, layer, shared)
    channel = GLU if c.mlp.kind == "glu" else MLP
    mlp = channel(c.width, c.mlp.width, activation=c.mlp.activation, **shared)
    norms = [
        make_norm(c.norm, c.width, c.norm_eps, param_dtype=shared["param_dtype"], rngs=rngs)
        for _ in range(2)
    ]
    residual = c.residual
    return Block(
        mixer,
        mlp,
        *norms,
        mixer_weights=residual.lightning if kind.startswith("lightning") else residual.softmax,
        mlp_weights=residual.mlp,
        post_norm=residual.post_norm,
        mlp_chunk=c.mlp.chunk,
        axes=axes,
    )


def make_mixer(model: Decoder, kind: str, layer: Int[Array, ""], shared: dict[str, Any]) -> Mixer:
    """The token mixer of one layer."""
    c, parallel = model.config, model.parallel
    linear, soft, sparse = c.lightning, c.softmax, c.sparse
    heads = (c.width, soft.num_heads, soft.head_dim)
    rotary = {
        "num_kv_heads": soft.num_kv_heads,
        "rope_base": soft.rope_base if soft.rope else None,
        "rope_fraction": soft.rope_fraction,
        "rope_scaling": soft.rope_scaling,
        "qk_norm": soft.qk_norm,
        "norm_eps": c.norm_eps,
    }
    match kind:
        case "lightning" | "lightning+lrpe":
            return LightningAttention(
                c.width,
                linear.num_heads,
                linear.head_dim,
                log_decay=_log_decay(c)[layer],
                lrpe=kind == "lightning+lrpe",
                activation=linear.activation,
                value_activation=linear.value_activation,
                gate=linear.gate,
                norm=linear.norm,
                norm_eps=linear.norm_eps,
                strategy=parallel.states,
                layout=parallel.token_layout,
                **shared,
            )
        case "tied":
            return TiedAttention(*heads, key_norm=sparse.key_norm, **shared)
        case "hash":
            options = {"key_norm": sparse.key_norm, "num_buckets": sparse.num_buckets}
            return HashAttention(*heads, **options, **shared)
        case "drop":
            return DropAttention(*heads, key_norm=sparse.key_norm, drop=sparse.drop, **shared)
        case "tensorized":
            folded = {f.name: getattr(c.tensorized, f.name) for f in fields(c.tensorized)}
            return TensorizedAttention(*heads, layout=parallel.layout, **folded, **rotary, **shared)
    return SelfAttention(
        *heads,
        window=soft.window if kind == "window" else None,
        strategy=parallel.strategy,
        head_groups=parallel.head_groups,
        layout=parallel.token_layout,
        **rotary,
        **shared,
    )


def _log_decay(config: ModelConfig) -> Float[Array, "L H"]:
    """Decays of every layer; the layer index counts all layers, whatever their mixer."""
    heads, layers = config.lightning.num_heads, config.num_layers
    if config.lightning.position in ("lrpe", "absolute"):
        return jnp.zeros((layers, heads), jnp.float32)
    family = alibi_log_decay if config.lightning.slopes == "alibi" else printed_log_decay
    temperature = config.lightning.temperature
    return jnp.stack([family(heads, i, layers, temperature=temperature) for i in range(layers)])


def build(
    config: ModelConfig,
    *,
    rngs: nnx.Rngs,
    axes: Axes = DEFAULT_AXES,
    parallel: ParallelConfig = ONE_DEVICE,
) -> Decoder:
    """The model that `config` describes, with random parameters."""
    return Decoder(config, axes=axes, parallel=parallel, rngs=rngs)


def count_parameters(config: ModelConfig) -> int:
    """How many parameters the model has; nothing is allocated."""
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
