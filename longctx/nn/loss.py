"""Cross entropy over the vocabulary, in chunks of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.parallel.mesh import free_size, shard_operator
from pallas_kernels._pallas import unify_varying, varying_axes


def chunked_cross_entropy(
    hidden: Float[Array, "B T M"],
    head: Float[Array, "V M"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 1024,
    axes: Axes = DEFAULT_AXES,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target, in nats; the logits [T, V] never exist at once.

    nll = logsumexp_v(hidden . head_v) - hidden . head_target. Products take the inputs' dtype and
    accumulate in float32, in which everything else is done, the sum of the head's gradient over
    a device's tokens included. Forward and backward hold `chunk` x V logits; the backward computes
    them again. On a mesh each device takes its own tokens and, along `tensor`, its own part of the
    vocabulary: logsumexps and target logits are added up over the parts, once for all chunks.

    Args:
      hidden: what the model returns, of the compute dtype.
      head: output embedding, of the same dtype.
      targets: in [0, V); mask by multiplying the result.
      chunk: tokens per device whose logits are held at once.

    Raises:
      ValueError: `chunk` < 1; or B or T is no multiple of the devices that split it.
    """
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")

    vocab, parts, columns = head.shape[0], free_size(axes.tensor), free_size(axes.columns)
    head = jnp.pad(head, ((0, -vocab % parts), (0, 0)))
    split = axes.tensor if parts > 1 else None
    gathered = axes.columns if columns > 1 and head.shape[1] % columns == 0 else None

    def operator(hidden, head, targets):
        shape = targets.shape
        if gathered is not None:  # here, since its transpose scatters the gradient's sum
            head = lax.all_gather(head, gathered, axis=1, tiled=True)
        tokens, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        varying = varying_axes(tokens, targets, head)
        tokens, head, targets = unify_varying((tokens, head, targets), varying)
        part = _Part(min(chunk, targets.size), vocab, split)
        return _nll(part, tokens, head, targets).reshape(shape)

    tokens = P(axes.batch, axes.seq)
    specs = P(*tokens, None), P(split, gathered), tokens
    return shard_operator(operator, specs, tokens)(hidden, head, targets)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is static: tokens per chunk, and how the vocabulary is cut."""

    chunk: int
    vocab: int
    axis: str | None  # mesh axis along which devices hold parts of it

    def ids(self, head: Float[Array, "V M"]) -> Int[Array, "1 V"]:
        """Token ids of this device's rows of the head."""
        first = lax.axis_index(self.axis) * head.shape[0] if self.axis else 0
        return (first + jnp.arange(head.shape[0], dtype=jnp.int32))[None]

    def logits(self, tokens: Float[Array, "C M"], head: Float[Array, "V M"]) -> Float[Array, "C V"]:
        """Logits of this device's part; -inf for ids beyond the vocabulary, which fill it up."""
        logits = jnp.einsum("cm,vm->cv", tokens, head, preferred_element_type=jnp.float32)
        return (
            logits
            if self.axis is None
            else jnp.where(self.ids(head) < self.vocab, logits, -jnp.inf)
        )

    def all_parts(self, lse: Float[Array, "N"], picked: Float[Array, "N"]) -> tuple[Array, Array]:
        """Logsumexp and target logit over all parts, from those of this one."""
        if self.axis is None:
            return lse, picked
        most = lax.pmax(lse, self.axis)
        return most + jnp.log(lax.psum(jnp.exp(lse - most), self.axis)), lax.psum(picked, self.axis)


def _chunks(chunk: int, *arrays: Array) -> list[Array]:
    """Arrays of tokens [N, ...] as [N / chunk, chunk, ...], padded with zeros."""
    pad = -arrays[0].shape[0] % chunk
    padded = (jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return [x.reshape(-1, chunk, *x.shape[1:]) for x in padded]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    part: _Part, tokens: Float[Array, "N M"], head: Float[Array, "V M"], targets: Int[Array, "N"]
) -> Float[Array, "N"]:
    return _nll_forward(part, tokens, head, targets)[0]


def _nll_forward(part, tokens, head, targets):
    def of_chunk(xs):
        tokens, targets = xs
        logits = part.logits(tokens, head)
        hit = part.ids(head) == targets[:, None]
        return jax.nn.logsumexp(logits, axis=1), jnp.sum(jnp.where(hit, logits, 0), axis=1)

    lse, picked = (
        x.reshape(-1)[: targets.size]
        for x in lax.map(of_chunk, tuple(_chunks(part.chunk, tokens, targets)))
    )
    lse, picked = part.all_parts(lse, picked)
    return lse - picked, (tokens, head, targets, lse)


def _nll_backward(part, saved, dnll):
    tokens, head, targets, lse = saved

    def body(dhead, xs):
        tokens, targets, lse, dnll = xs
        probability = jnp.exp(part.logits(tokens, head) - lse[:, None])
        hit = part.ids(head) == targets[:, None]
        dlogits = ((probability - hit) * dnll[:, None]).astype(tokens.dtype)
        dhead += jnp.einsum("cv,cm->vm", dlogits, tokens, preferred_element_type=jnp.float32)
        return dhead, jnp.einsum("cv,vm->cm", dlogits, head).astype(tokens.dtype)

    start = unify_varying(jnp.zeros(head.shape, jnp.float32), varying_axes(tokens))
    dhead, dtokens = lax.scan(body, start, tuple(_chunks(part.chunk, tokens, targets, lse, dnll)))
    dtokens = dtokens.reshape(-1, tokens.shape[1])[: targets.size]
    return dtokens, dhead.astype(head.dtype), None


_nll.defvjp(_nll_forward, _nll_backward)
