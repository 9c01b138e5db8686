"""Functions of single tokens over some tokens at a time, so that what is wide exists for few."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from longctx.nn.sharding import Axes
from longctx.parallel.mesh import place_explicit, sequence_axis
from longctx.parallel.placement import place


def in_chunks(
    function: Callable[[Array, Any], Array],
    x: Float[Array, "B T M"],
    weights: Any,
    chunk: int,
    axes: Axes,
) -> Float[Array, "B T M"]:
    """`function` of tokens, treated alike, and weights, on `chunk` tokens of a device at a time.

    The backward pass computes each chunk again, so that what `function` makes of a token, such as
    the wide features of an MLP, exists for `chunk` tokens only, whatever the length. The gradients
    of the weights are summed over the chunks in float32. Source: the blockwise feed-forward of
    2305.19370 and 2310.01889. `chunk` 0: all tokens at once, and kept.
    """
    batch, length, width = x.shape
    devices, inside = sequence_axis(axes.seq)
    shards = 1 if inside or length % devices else devices
    local = length // shards
    if not 0 < chunk < local:
        return function(x, weights)
    # No other axis may split what is cut into chunks.
    rows = P(axes.batch, axes.seq if shards > 1 else None)
    x = place_explicit(x, rows)
    padded = jnp.pad(
        x.reshape(batch, shards, local, width), ((0, 0),) * 2 + ((0, -local % chunk), (0, 0))
    )
    parts = jnp.moveaxis(padded.reshape(batch, shards, -1, chunk, width), 2, 0)
    # The weights come ready for use: what would make them so in the loop, XLA on GPUs would do anew
    # for every chunk.
    wide = jax.tree.map(_wide, weights)

    @jax.checkpoint
    def one(part: Float[Array, "B P C M"]) -> Float[Array, "B P C M"]:
        tokens = place(part.reshape(batch, shards * chunk, width), axes.hidden)
        made = function(tokens, jax.tree.map(_summed_in, wide, weights))
        return place_explicit(made, rows).reshape(part.shape)

    done = jnp.moveaxis(jax.lax.map(one, parts), 0, 2).reshape(padded.shape)
    return done[:, :, :local].reshape(x.shape)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.custom_vjp
def _summed_in(wide: Array, weight: Array) -> Array:
    """`weight`; its gradient goes to `wide`, the same in float32, and is summed there."""
    return weight


def _summed_in_forward(wide: Array, weight: Array) -> tuple[Array, None]:
    return weight, None


def _summed_in_backward(_: None, gradient: Array) -> tuple[Array, None]:
    return _wide(gradient), None


_summed_in.defvjp(_summed_in_forward, _summed_in_backward)
