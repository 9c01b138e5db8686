"""Cross entropy over the vocabulary, in chunks of tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.nn.sharding import DEFAULT_AXES, Axes
from longctx.parallel.mesh import shard_operator
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
    accumulate in float32, in which everything else is done, the sum of the head's gradient
    included. Forward and backward hold `chunk` x V logits; the backward computes them again.
    On a mesh each device takes its own tokens, those of one `tensor` group shared out among it,
    against the whole head.

    Args:
      hidden: what the model returns, of the compute dtype.
      head: output embedding, of the same dtype.
      targets: in [0, V); mask by multiplying the result.
      chunk: tokens per device whose logits are held at once.

    Raises:
      ValueError: `chunk` < 1; or T is no multiple of the devices along `seq` and `tensor`.
    """
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")

    def operator(hidden, head, targets):
        shape = targets.shape
        tokens, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        varying = varying_axes(tokens, targets, head)
        tokens, head, targets = unify_varying((tokens, head, targets), varying)
        return _nll(min(chunk, targets.size), tokens, head, targets).reshape(shape)

    tokens = P(axes.batch, tuple(name for name in (axes.seq, axes.tensor) if name))
    return shard_operator(operator, (P(*tokens, None), P(), tokens), tokens)(hidden, head, targets)


def _chunks(chunk: int, *arrays: Array) -> list[Array]:
    """Arrays of tokens [N, ...] as [N / chunk, chunk, ...], padded with zeros."""
    pad = -arrays[0].shape[0] % chunk
    padded = (jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))) for x in arrays)
    return [x.reshape(-1, chunk, *x.shape[1:]) for x in padded]


def _logits(tokens: Float[Array, "C M"], head: Float[Array, "V M"]) -> Float[Array, "C V"]:
    return jnp.einsum("cm,vm->cv", tokens, head, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    chunk: int, tokens: Float[Array, "N M"], head: Float[Array, "V M"], targets: Int[Array, "N"]
) -> Float[Array, "N"]:
    return _nll_forward(chunk, tokens, head, targets)[0]


def _nll_forward(chunk, tokens, head, targets):
    def nll_of(xs):
        tokens, targets = xs
        logits = _logits(tokens, head)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        lse = jax.nn.logsumexp(logits, axis=1)
        return lse - picked, lse

    nll, lse = (
        x.reshape(-1)[: targets.size]
        for x in lax.map(nll_of, tuple(_chunks(chunk, tokens, targets)))
    )
    return nll, (tokens, head, targets, lse)


def _nll_backward(chunk, saved, dnll):
    tokens, head, targets, lse = saved

    def body(dhead, xs):
        tokens, targets, lse, dnll = xs
        probability = jnp.exp(_logits(tokens, head) - lse[:, None])
        hit = jnp.arange(head.shape[0], dtype=targets.dtype)[None, :] == targets[:, None]
        dlogits = ((probability - hit) * dnll[:, None]).astype(tokens.dtype)
        dhead += jnp.einsum("cv,cm->vm", dlogits, tokens, preferred_element_type=jnp.float32)
        return dhead, jnp.einsum("cv,vm->cm", dlogits, head).astype(tokens.dtype)

    start = unify_varying(jnp.zeros(head.shape, jnp.float32), varying_axes(dnll, tokens))
    dhead, dtokens = lax.scan(body, start, tuple(_chunks(chunk, tokens, targets, lse, dnll)))
    dtokens = dtokens.reshape(-1, tokens.shape[1])[: targets.size]
    return dtokens, dhead.astype(head.dtype), None


_nll.defvjp(_nll_forward, _nll_backward)
