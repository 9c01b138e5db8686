"""The decoder block, and stacks of blocks scanned over their repeats."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from longctx.attention.slots import LayerSlots
from longctx.nn.cache import Cache
from longctx.nn.chunks import in_chunks
from longctx.nn.linear import gather_layers
from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.nn.weights import Gathered
from longctx.parallel.lasp import INCOMING
from longctx.parallel.mesh import place_explicit
from longctx.parallel.placement import place, placed_by_xla, split_of

type Remat = Literal["none", "block", "dots"]
Gather = Literal["layer", "step"]

_incoming = jax.checkpoint_policies.save_only_these_names(INCOMING)
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "block": _incoming,  # keep only what enters each block, from earlier layers and tokens
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _incoming, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


class Mixer(Protocol):
    """What `Block` needs of a token mixer; `LightningAttention` documents the arguments."""

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """A cache without tokens."""
        ...

    def __call__(
        self,
        x: Float[Array, "B T M"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        doc_start: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """Mix tokens."""
        ...


class ChannelMixer(Protocol):
    """What `Block` needs of an MLP."""

    def weights(self) -> Any:
        """What a call takes of the parameters, the same for all tokens."""
        ...

    def __call__(self, x: Float[Array, "B T M"], weights: Any = None) -> Float[Array, "B T M"]:
        """Mix channels, token by token, with these `weights` or else its own."""
        ...


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); called like a mixer.

    Args:
      mixer_weights, mlp_weights: (alpha, beta) for alpha x + beta f(norm(x)).
      post_norm: with y = norm(x), alpha y + beta f(y): the stream itself is normalised.
      mlp_chunk: the MLP runs over so many tokens of a device at a time (`in_chunks`); 0: all.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp: ChannelMixer,
        mixer_norm: Callable[[Array], Array],
        mlp_norm: Callable[[Array], Array],
        *,
        mixer_weights: tuple[float, float] = (1.0, 1.0),
        mlp_weights: tuple[float, float] = (1.0, 1.0),
        post_norm: bool = False,
        mlp_chunk: int = 0,
        axes: Axes = DEFAULT_AXES,
    ):
        self.mixer, self.mlp, self.mlp_chunk, self.axes = mixer, mlp, mlp_chunk, axes
        self.mixer_norm, self.mlp_norm = mixer_norm, mlp_norm
        self.mixer_weights, self.mlp_weights = mixer_weights, mlp_weights
        self.post_norm = post_norm

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """The mixer's cache."""
        return self.mixer.init_cache(batch, max_length)

    @property
    def in_place(self) -> bool:
        """Whether the mixer takes `LayerSlots` for the arrays of its cache."""
        return getattr(self.mixer, "in_place", False)

    def __call__(
        self, x: Float[Array, "B T M"], cache: Cache | None = None, **where: Any
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """One layer."""
        y = self.mixer_norm(x)
        mixed, cache = self.mixer(y, cache, **where)
        x = place(self._join(x, y, mixed, self.mixer_weights), self.axes.hidden)
        x = in_chunks(self._mix_channels, x, self.mlp.weights(), self.mlp_chunk, self.axes)
        return place(x, self.axes.hidden), cache

    def _mix_channels(self, x: Float[Array, "B T M"], weights: Any) -> Float[Array, "B T M"]:
        y = self.mlp_norm(x)
        return self._join(x, y, self.mlp(y, weights), self.mlp_weights)

    def _join(self, x: Array, y: Array, fy: Array, weights: tuple[float, float]) -> Array:
        alpha, beta = weights
        fy = place_explicit(fy, self.axes.hidden)
        return alpha * (y if self.post_norm else x) + beta * fy


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times the same period of layers.

    Each entry of `layers` makes one block from its index among all layers (traced, since the
    repeats are created by one `vmap`) and the random streams.
    """

    layers: tuple[Callable[[Int[Array, ""], nnx.Rngs], Block], ...]
    repeats: int


class Period(nnx.Module):
    """The blocks of one period; of a whole segment once its parameters are stacked."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List(blocks)


class Stack(nnx.Module):
    """Blocks in sequence, segment by segment, each compiled once however often it repeats.

    Parameters of a segment have a leading axis of repeats. The cache's memory has one entry per
    segment, each a tuple over the layers of a period, with the same leading axis.

    Args:
      segments: the layers, in order.
      remat: what the backward pass recomputes: "none"; "block", everything but the input of each
        block and the states that devices have exchanged; "dots", everything but these and the
        results of dense products.
      unroll: compile every repeat on its own in calls without a cache: larger, may be faster.
      gather: when, in calls without a cache, devices along the sequence that hold parts of weights
        exchange them: for each "layer" anew, or for all layers at once in every "step".
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        remat: Remat = "none",
        unroll: bool = False,
        gather: Gather = "layer",
        rngs: nnx.Rngs,
    ):
        if remat not in ("none", *REMAT_POLICIES):
            raise ValueError(f"{remat=} must be 'none' or one of {sorted(REMAT_POLICIES)}")
        self.remat, self.unroll, self.gather = remat, unroll, gather
        self.periods = nnx.List([])
        first = 0
        for segment in segments:
            self.periods.append(_stacked(segment, first, rngs))
            first += len(segment.layers) * segment.repeats
        self.repeats = tuple(segment.repeats for segment in segments)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """The cache of all layers, without tokens."""

        def repeated(block: Block, repeats: int) -> Any:
            memory = block.init_cache(batch, max_length).memory
            return jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), memory)

        memory = tuple(
            tuple(repeated(block, repeats) for block in period.blocks)
            for period, repeats in zip(self.periods, self.repeats, strict=True)
        )
        return Cache(jnp.zeros(batch, jnp.int32), memory)

    def __call__(
        self, x: Float[Array, "B T M"], cache: Cache | None = None, **where: Any
    ) -> tuple[Float[Array, "B T M"], Cache | None]:
        """All layers; arguments and modes are a mixer's."""
        if cache is None:
            for period, repeats in zip(self.periods, self.repeats, strict=True):
                x = self._run(period, repeats, x, where)
            return x, None
        memories = []
        for period, repeats, memory in zip(self.periods, self.repeats, cache.memory, strict=True):
            x, memory = _continued(period, repeats, x, Cache(cache.length, memory), where)
            memories.append(memory)
        lengths = where.get("lengths")
        return x, cache.advance(tuple(memories), x.shape[1] if lengths is None else lengths)

    def _run(
        self, period: Period, repeats: int, x: Float[Array, "B T M"], where: dict[str, Any]
    ) -> Float[Array, "B T M"]:
        """A segment on whole sequences."""
        period = gather_layers(period) if self.gather == "step" else period
        split = (nnx.split(block, Gathered, ...) for block in period.blocks)
        graphs, gathered, states = zip(*split, strict=True)

        def layer(graph, gathered, index, state, x):
            weights = _get(gathered, index, axis=1)
            return nnx.merge(graph, weights, state)(x, **where)[0]

        if self.remat != "none":
            # Where no loop is left, XLA would see that the backward pass computes what the forward
            # has, and keep that.
            alone = self.unroll or repeats == 1
            layer = jax.checkpoint(
                layer, policy=REMAT_POLICIES[self.remat], prevent_cse=alone, static_argnums=0
            )

        def once(x, numbered):
            index, states = numbered
            for graph, weights, state in zip(graphs, gathered, states, strict=True):
                x = layer(graph, weights, index, state, x)
            return x, None

        numbered = jnp.arange(repeats), states
        return jax.lax.scan(once, x, numbered, unroll=self.unroll)[0]


def _continued(
    period: Period, repeats: int, x: Float[Array, "B T M"], cache: Cache, where: dict[str, Any]
) -> tuple[Float[Array, "B T M"], Any]:
    """A segment on new tokens, and its memory with them.

    The memory is carried and written in place: scanned over, it would be held twice. The loop
    counts layers itself: XLA's kernels read slices where they lie if it sees what they depend on.
    """
    graph, state = nnx.split(period)

    def once(carry):
        layer, x, memory = carry
        blocks, kept = nnx.merge(graph, _get(state, layer)).blocks, []
        for block, whole in zip(blocks, memory, strict=True):
            get = _in_place if block.in_place else _get
            x, seen = block(x, Cache(cache.length, get(whole, layer)), **where)
            assert seen is not None, "a mixer returns the cache that it was given"
            kept.append(_put(whole, seen.memory, layer))
        return layer + 1, x, tuple(kept)

    first = jnp.zeros((), jnp.int32), x, cache.memory
    _, x, memory = jax.lax.while_loop(lambda carry: carry[0] < repeats, once, first)
    return x, memory


def _get(stacked: Any, index: Int[Array, ""], axis: int = 0) -> Any:
    """One layer's part of stacked arrays."""

    def get(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(
            x, index, axis, keepdims=False, allow_negative_indices=False
        )

    return jax.tree.map(get, stacked)


def _in_place(stacked: Any, index: Int[Array, ""]) -> Any:
    """One layer's part of a stacked memory, where it lies."""
    return jax.tree.map(lambda x: LayerSlots(x, index), stacked)


def _put(stacked: Any, memory: Any, index: Int[Array, ""]) -> Any:
    """`stacked` with one layer's part replaced."""

    def put(x: Array, new: Array | LayerSlots) -> Array:
        if isinstance(new, LayerSlots):
            return new.layers
        update = functools.partial(
            jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False
        )
        return placed_by_xla(update, x, new, index, split=split_of(x))

    return jax.tree.map(put, stacked, memory)


def _stacked(segment: Segment, first: int, rngs: nnx.Rngs) -> Period:
    """The parameters of every repeat, made by one `vmap`."""

    @nnx.split_rngs(splits=segment.repeats)
    @nnx.vmap(in_axes=(0, 0), transform_metadata={nnx.PARTITION_NAME: None})
    def make(start: Int[Array, ""], rngs: nnx.Rngs) -> Period:
        return Period([layer(start + j, rngs) for j, layer in enumerate(segment.layers)])

    return make(first + len(segment.layers) * jnp.arange(segment.repeats), rngs)
