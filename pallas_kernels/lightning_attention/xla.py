"""Lightning attention by chunks in plain JAX: runs anywhere, memory linear in the length.

With rows i = 0..m-1 of one chunk, lambda = exp(log_decay), S the state before the chunk:

    O = ((Q K^T) * pair) V + query * (Q S)      pair_ij = lambda^(i-j) for i >= j, else 0
    S <- carry S + (key * K)^T V                query_i = lambda^(i+1)
                                                key_j   = lambda^(m-1-j),  carry = lambda^m

A loop over chunks carries the float32 state. The backward keeps nothing of the forward: one
sweep forwards in time recomputes S and gives dQ; one backwards carries dS and gives dK and dV.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.lightning_attention.tiles import Spec, XlaTiles, state_dtype


def unsupported(spec: Spec) -> str | None:
    """Serve every call."""
    del spec
    return None


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Of products: exact for float32 inputs; one accelerator pass is enough for 16-bit ones."""
    return lax.Precision.HIGHEST if dtype.itemsize >= 4 else lax.Precision.DEFAULT


class _Decays(NamedTuple):
    """Decays inside one chunk; b is 1, or B once documents have been cut apart."""

    pair: Float[Array, "b H C C"]
    query: Float[Array, "b H C 1"]
    key: Float[Array, "b H C 1"]
    carry: Float[Array, "b H 1 1"]


def _decays(log_decay: Float[Array, "H"], length: int) -> _Decays:
    rate = log_decay[None, :, None, None]
    row = jnp.arange(length, dtype=rate.dtype)
    distance = row[:, None] - row[None, :]
    column = row[None, None, :, None]
    return _Decays(
        pair=jnp.where(distance >= 0, jnp.exp(rate * abs(distance)[None, None]), 0),
        query=jnp.exp(rate * (column + 1)),
        key=jnp.exp(rate * (length - 1 - column)),
        carry=jnp.exp(rate * length),
    )


def _cut(decays: _Decays, start: Int[Array, "B C"], position: Int[Array, ""]) -> _Decays:
    """Remove what crosses a document boundary in the chunk that begins at `position`."""
    key = position + jnp.arange(start.shape[1], dtype=start.dtype)
    begins, last = start[:, None, :, None], start[:, None, -1:, None]
    return _Decays(
        pair=jnp.where(begins <= key[None, None, None, :], decays.pair, 0),
        query=jnp.where(begins < position, decays.query, 0),
        key=jnp.where(last <= key[None, None, :, None], decays.key, 0),
        carry=jnp.where(last < position, decays.carry, 0),
    )


class _Call:
    """What forward and backward share: chunks, decays, precision, and the loop over chunks."""

    def __init__(self, k, v, log_decay, doc_start, tiles, *others):
        self.length, self.chunk = k.shape[1], (tiles or XlaTiles()).chunk
        self.wide = state_dtype(k.dtype)
        self.dot = functools.partial(jnp.einsum, precision=precision(k.dtype))
        self.log_decay, self.doc_start = log_decay.astype(self.wide), doc_start
        self.state_shape = (k.shape[0], *k.shape[2:], v.shape[3])
        self.axes = varying_axes(k, v, log_decay, doc_start, *others)

    def state(self, given):
        """The state to begin with: `given`, or zeros."""
        if given is None:
            given = jnp.zeros(self.state_shape, self.wide)
        return unify_varying(given.astype(self.wide), self.axes)

    def empty(self, like):
        """The buffer into which the chunks of a result are put, filled with any value of `like`.

        XLA has no uninitialised arrays on a CPU. One constant would be kept as an array of that
        size, and copied for each result that the program has.
        """
        return unify_varying(jnp.broadcast_to(like[:1, :1, :1, :1], like.shape), self.axes)

    def sweep(self, step: Callable, carry, *, reverse: bool = False):
        """Run `step(decays, position, carry) -> carry` over the chunks, the last one shorter."""
        chunks, tail = divmod(self.length, self.chunk)
        whole, rest = _decays(self.log_decay, self.chunk), _decays(self.log_decay, tail)

        def run(decays, position, carry):
            if self.doc_start is not None:
                size = decays.pair.shape[-1]
                start = lax.dynamic_slice_in_dim(self.doc_start, position, size, 1)
                decays = _cut(decays, start, position)
            return step(decays, position, carry)

        def body(n, carry):
            return run(whole, (chunks - 1 - n if reverse else n) * self.chunk, carry)

        if tail and reverse:
            carry = run(rest, np.int32(chunks * self.chunk), carry)
        if chunks:
            carry = lax.fori_loop(np.int32(0), np.int32(chunks), body, carry)
        if tail and not reverse:
            carry = run(rest, np.int32(chunks * self.chunk), carry)
        return carry

    def take(
        self, x: Float[Array, "B T H D"], decays: _Decays, position
    ) -> Float[Array, "B H C D"]:
        """One chunk of `x`, heads first and wide: XLA's 16-bit products are slow on CPU."""
        rows = lax.dynamic_slice_in_dim(x, position, decays.pair.shape[-1], 1)
        return rows.swapaxes(1, 2).astype(self.wide)

    def next_state(self, decays: _Decays, S, k, v):
        """The state after the chunk."""
        return decays.carry * S + self.dot("BHjD,BHjE->BHDE", decays.key * k, v)

    def previous_cotangent(self, decays: _Decays, dS, q, do):
        """The cotangent of the state before the chunk, from that of the state after it."""
        return decays.carry * dS + self.dot("BHiD,BHiE->BHDE", decays.query * q, do)


def _put(whole: Float[Array, "B T H D"], rows: Float[Array, "B H C D"], position):
    rows = rows.swapaxes(1, 2).astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, rows, position, 1)


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: XlaTiles | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Outputs and final state."""
    call = _Call(k, v, log_decay, doc_start, tiles, q, state)

    def step(decays, position, carry):
        S, o = carry
        qc, kc, vc = (call.take(x, decays, position) for x in (q, k, v))
        scores = call.dot("BHiD,BHjD->BHij", qc, kc) * decays.pair
        rows = call.dot("BHij,BHjE->BHiE", scores, vc)
        rows += decays.query * call.dot("BHiD,BHDE->BHiE", qc, S)
        return call.next_state(decays, S, kc, vc), _put(o, rows, position)

    S, o = call.sweep(step, (call.state(state), call.empty(v)))
    return o, S


def bwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    do: Float[Array, "B T H E"],
    dstate: Float[Array, "B H D E"] | None,
    *,
    tiles: XlaTiles | None = None,
) -> tuple[
    Float[Array, "B T H D"],
    Float[Array, "B T H D"],
    Float[Array, "B T H E"],
    Float[Array, "B H D E"],
]:
    """Cotangents of q, k, v and the initial state."""
    call = _Call(k, v, log_decay, doc_start, tiles, q, state, do, dstate)

    def forwards(decays, position, carry):
        S, dq = carry
        kc, vc, doc = (call.take(x, decays, position) for x in (k, v, do))
        dscores = call.dot("BHiE,BHjE->BHij", doc, vc) * decays.pair
        rows = call.dot("BHij,BHjD->BHiD", dscores, kc)
        rows += decays.query * call.dot("BHiE,BHDE->BHiD", doc, S)
        return call.next_state(decays, S, kc, vc), _put(dq, rows, position)

    def backwards(decays, position, carry):
        dS, dk, dv = carry
        qc, kc, vc, doc = (call.take(x, decays, position) for x in (q, k, v, do))
        dscores = call.dot("BHiE,BHjE->BHij", doc, vc) * decays.pair
        scores = call.dot("BHiD,BHjD->BHij", qc, kc) * decays.pair
        dk_rows = call.dot("BHij,BHiD->BHjD", dscores, qc)
        dk_rows += decays.key * call.dot("BHjE,BHDE->BHjD", vc, dS)
        dv_rows = call.dot("BHij,BHiE->BHjE", scores, doc)
        dv_rows += decays.key * call.dot("BHjD,BHDE->BHjE", kc, dS)
        dS = call.previous_cotangent(decays, dS, qc, doc)
        return dS, _put(dk, dk_rows, position), _put(dv, dv_rows, position)

    _, dq = call.sweep(forwards, (call.state(state), call.empty(q)))
    carry = (call.state(dstate), call.empty(k), call.empty(do))
    dS, dk, dv = call.sweep(backwards, carry, reverse=True)
    return dq, dk, dv, dS


def final_state(
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    state: Float[Array, "B H D E"] | None,
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: XlaTiles | None = None,
) -> Float[Array, "B H D E"]:
    """The state after the last token."""
    call = _Call(k, v, log_decay, doc_start, tiles, state)

    def step(decays, position, S):
        kc, vc = (call.take(x, decays, position) for x in (k, v))
        return call.next_state(decays, S, kc, vc)

    return call.sweep(step, call.state(state))


def initial_cotangent(
    q: Float[Array, "B T H D"],
    do: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    doc_start: Int[Array, "B T"] | None,
    *,
    tiles: XlaTiles | None = None,
) -> Float[Array, "B H D E"]:
    """What `do` sends to the initial state."""
    call = _Call(q, do, log_decay, doc_start, tiles)

    def step(decays, position, dS):
        qc, doc = (call.take(x, decays, position) for x in (q, do))
        return call.previous_cotangent(decays, dS, qc, doc)

    return call.sweep(step, call.state(None), reverse=True)
