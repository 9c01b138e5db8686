"""Sampling from a model: one prefill of the prompts, then decoding token by token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from longctx.compiler import decoding_options
from longctx.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.0  # divides the logits; 0: always the most likely token
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities sum to this (1904.09751)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def generate(
    model: Decoder,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    keys: Key[Array, "B"] | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> Int[Array, "B N"]:
    """Continue each prompt by `max_new_tokens` tokens.

    The prompts are read once; every further token costs constant time and memory in lightning
    layers, and a pass over the cached keys and values in softmax layers. A row depends on its own
    prompt and key alone: in a batch it gives what it would give by itself.

    Args:
      model: of `longctx.models`.
      prompts: tokens, each row padded at its end with anything.
      lengths: of the prompts, each in [1, T]; None: all T.
      max_new_tokens: N.
      sampling: greedy by default.
      keys: one random key per row (`jax.random.split(key, B)`), needed unless sampling is greedy.
      stop: token that ends a row; the rest of that row repeats it, and decoding ends early once
        every row has ended.
      vocab_size: of the tokenizer, whose tokens alone are drawn; None: all that the model has.

    Raises:
      ValueError: a length or `max_new_tokens` below 1, or sampling without keys.
    """
    sampling = sampling or Sampling()
    if max_new_tokens < 1 or prompts.shape[1] < 1:
        raise ValueError(f"{max_new_tokens=} and {prompts.shape=}[1] must be at least 1")
    if lengths is not None and not ((lengths >= 1) & (lengths <= prompts.shape[1])).all():
        raise ValueError(f"{lengths=} must lie in [1, {prompts.shape[1]}]")
    graph, state = nnx.split(model)
    run = _jitted(jax.default_backend())
    return run(graph, state, prompts, lengths, keys, max_new_tokens, sampling, stop, vocab_size)


@functools.cache
def _jitted(platform: str) -> Any:
    return jax.jit(
        _generate,
        static_argnames=("graph", "count", "sampling", "stop", "vocab_size"),
        compiler_options=decoding_options(platform),
    )


def _generate(graph, state, prompts, lengths, keys, count, sampling, stop, vocab_size):
    model = nnx.merge(graph, state)
    batch, length = prompts.shape

    def draw(logits, i):
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return sample(logits[:, :vocab_size], sampling, step_keys)

    def unfinished(carry):
        i, _, token, _ = carry
        ended = False if stop is None else jnp.all(token == stop)
        return (i < count) & ~jnp.asarray(ended)

    def step(carry):
        i, out, token, cache = carry
        logits, cache = model.decode(token, cache)
        following = draw(logits, i)
        if stop is not None:
            following = jnp.where(token == stop, stop, following)
        return i + 1, out.at[:, i].set(following), following, cache

    logits, cache = model.prefill(prompts, lengths, model.init_cache(batch, length + count))
    first = draw(logits, 0)
    out = jnp.full((batch, count), 0 if stop is None else stop, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), out, first, cache))[1]


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, "B"] | None = None
) -> Int[Array, "B"]:
    """One token per row.

    Raises:
      ValueError: the temperature is not 0, and there are no keys.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError(f"{sampling} needs keys, one per row")
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        kept = jnp.sum(mass < sampling.top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(descending, jnp.minimum(kept, logits.shape[-1] - 1), axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
