"""Mixed-radix tensorized attention: one causal window per dimension, each over a strided view.

For windows n_1 ... n_m, fast to slow, and strides s_1 = 1, s_i = n_1 ... n_(i-1), hop i is

    V_i[t] = sum_{d < n_i, d s_i <= t} softmax_d(q_t . k_{t - d s_i} / sqrt(D)) V_{i-1}[t - d s_i]

from V_0 = v. A displacement has one expansion in the radices n_i, so every token of the past is
reached by exactly one path, none of the future by any. A hop is a windowed flash attention on the
view [B, N/s, s H, D] of [B, N, H, D], which costs nothing.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longctx.attention.rotary import rope
from longctx.parallel.ulysses import repeat_heads
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import block_backward, flash_attention, row_delta

type Order = Literal["slow_first", "fast_first"]
type Positions = Literal["digit", "global"]
type Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Hop:
    """Attention to the last `window` tokens of those `stride` apart, itself included.

    `window` None means all. By "digit", RoPE sees the distance between two tokens divided by
    the stride, which stays below the window; by "global" their distance, counted with neighbours
    `spacing` apart (more than 1 where a device holds every so-many-th token).
    """

    stride: int
    window: int | None
    positions: Positions = "digit"
    scale: float = 1.0
    backend: str = "auto"
    spacing: int = 1

    def rotated(
        self,
        positions: Int[Array, "#B T"],
        frequencies: Float[Array, "D/2"] | None,
        x: Float[Array, "B T _ D"],
    ) -> Float[Array, "B T _ D"]:
        """`x` as this hop sees it at token `positions`."""
        if frequencies is None:
            return x
        by_digit = self.positions == "digit"
        positions = positions // self.stride if by_digit else positions * self.spacing
        return rope(positions, frequencies, x)[0]


def make_hops(
    dims: Dims, length: int, order: Order, positions: Positions, scale: float, backend: str
) -> tuple[tuple[int, Hop], ...]:
    """(index of the dimension, its hop) in the order they run.

    Hops that see only their own token are left out: they pass values on.
    """
    check_dims(dims)
    check_choices(order, positions)
    hops, stride = [], 1
    for i, window in enumerate(dims):
        if window != 1 and stride < length:
            hops.append((i, Hop(stride, window, positions, scale, backend)))
        stride *= window or 1
    return tuple(hops if order == "fast_first" else reversed(hops))


def check_dims(dims: Dims) -> None:
    """Raise ValueError unless all are positive integers; the last may be None instead."""
    known = isinstance(dims, Sequence) and len(dims) > 0
    bounded = dims[:-1] if known and dims[-1] is None else dims
    if not known or any(not isinstance(n, numbers.Integral) or n < 1 for n in bounded):
        raise ValueError(
            f"{dims=} must be positive integers, fast to slow; only the last may be None"
        )


def check_choices(order: Order, positions: Positions) -> None:
    """Raise ValueError if either is misspelt."""
    for name, value, allowed in (
        ("order", order, ("slow_first", "fast_first")),
        ("positions", positions, ("digit", "global")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {allowed}")


def mixed_radix_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    *,
    dims: Dims,
    order: Order = "slow_first",
    positions: Positions = "digit",
    frequencies: Float[Array, "D/2"] | None = None,
    self_bias: Float[Array, "L H"] | None = None,
    doc_start: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H E"]:
    """The variant "mixed_radix" of `tensorized_attention`, which documents the arguments."""
    heads, length = q.shape[2], q.shape[1]
    if self_bias is not None and self_bias.shape != (len(dims) - 1, heads):
        raise ValueError(f"{self_bias.shape=} must be [m - 1, H] = {(len(dims) - 1, heads)}")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    for i, hop in make_hops(dims, length, order, positions, scale, backend):
        bias = None if self_bias is None or i == 0 else self_bias[i - 1]
        args = (q, k, v, bias, frequencies, doc_start)
        v = attend_along(hop, *unify_varying(args, varying_axes(*args)))
    return repeat_heads(v, heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_along(
    hop: Hop,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T _ E"],
    bias: Float[Array, "H"] | None,
    frequencies: Float[Array, "D/2"] | None,
    doc_start: Int[Array, "B T"] | None,
) -> Float[Array, "B T H E"]:
    """One hop. `v` has the keys' heads or, after another hop, the queries'."""
    return _attend_fwd(hop, q, k, v, bias, frequencies, doc_start)[0]


def _attend_fwd(hop, q, k, v, bias, frequencies, doc_start):
    strided = _Strided(hop, q.shape[1], q.shape[2], bias is not None, doc_start)
    arrays = strided.fold_all(q, k, v, frequencies)
    o, lse = flash_attention(*arrays, return_lse=True, **strided.mask, **strided.options)
    o, lse = strided.unfold(o), strided.unfold_rows(lse)
    if bias is not None:
        own = self_scores(q, k, bias, hop.scale)
        o, lse = _add_self(o, lse, v, own)
    return o, (q, k, v, bias, frequencies, doc_start, o, lse)


def _attend_bwd(hop, saved, do):
    """The probabilities of both parts are exp(score - lse) with the lse of the whole row."""
    q, k, v, bias, frequencies, doc_start, o, lse = saved
    strided = _Strided(hop, q.shape[1], q.shape[2], bias is not None, doc_start)
    delta = row_delta(o, lse, do, jnp.zeros_like(lse))
    folded, pull = jax.vjp(strided.fold_all, q, k, v, frequencies)
    rows = (strided.fold(do), strided.fold_rows(lse), strided.fold_rows(delta))
    grads = block_backward(*folded, *rows, **strided.mask, **strided.options)
    dq, dk, dv, dfrequencies = pull(grads)
    dbias = None
    if bias is not None:
        own, pull_own = jax.vjp(lambda q, k, bias: self_scores(q, k, bias, hop.scale), q, k, bias)
        p = jnp.exp(own - lse)
        values, pull_values = jax.vjp(lambda v: repeat_heads(v, q.shape[2]), v)
        # do . v - delta, of do as it is rounded: 0 where a row sees nothing but itself.
        dq_own, dk_own, dbias = pull_own(p * row_delta(values, lse, do, delta))
        (dv_own,) = pull_values((_per_row(p) * do.astype(p.dtype)).astype(v.dtype))
        dq, dk, dv = dq + dq_own, dk + dk_own, dv + dv_own
    return dq, dk, dv, dbias, dfrequencies, None


attend_along.defvjp(_attend_fwd, _attend_bwd)


def self_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    bias: Float[Array, "H"],
    scale: float,
) -> Float[Array, "B H T"]:
    """scale q_t . k_t + bias, in float32; a rotation by equal positions cancels."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    product = q.astype(wide) * repeat_heads(k.astype(wide), q.shape[2])
    return scale * jnp.swapaxes(product.sum(-1), 1, 2) + bias[None, :, None].astype(wide)


def _add_self(o: Array, lse: Array, v: Array, own: Array) -> tuple[Array, Array]:
    """Add a row's own value with score `own` to the attention `o`, `lse` over other rows."""
    total = jnp.logaddexp(lse, own)
    wide = lse.dtype
    others = _per_row(jnp.exp(lse - total)) * o.astype(wide)
    itself = _per_row(jnp.exp(own - total)) * repeat_heads(v, o.shape[2]).astype(wide)
    return (others + itself).astype(o.dtype), total


def _per_row(x: Float[Array, "B H T"]) -> Float[Array, "B T H 1"]:
    return jnp.swapaxes(x, 1, 2)[..., None]


class _Strided:
    """Views in which the tokens `stride` apart are neighbours: residues join the heads.

    [B, T, H, D] -> [B, T / s, s H, D], after padding T to a multiple of s. The layout in memory
    is the same, and query head `j H + h` reads key head `j K + h // (H // K)` as it must.
    """

    def __init__(self, hop: Hop, length: int, heads: int, strict: bool, doc_start: Array | None):
        self.hop, self.length, self.heads = hop, length, heads
        self.padding = -length % hop.stride
        self.options = {"scale": hop.scale, "backend": hop.backend}
        window = hop.window
        if strict:  # the token's own edge is added apart
            window = None if window is None else window - 1
        self.mask = {
            "causal": True,
            "window": window,
            "q_offset": -1 if strict else 0,
            "lo": None if doc_start is None else self._first(doc_start),
        }

    def fold_all(
        self, q: Array, k: Array, v: Array, frequencies: Array | None
    ) -> tuple[Array, Array, Array]:
        """Rotated q and k, and v, as views; keys repeated where every query head has values."""
        time = jnp.arange(self.length, dtype=jnp.int32)[None]
        q, k = (self.hop.rotated(time, frequencies, x) for x in (q, k))
        return self.fold(q), self.fold(repeat_heads(k, v.shape[2])), self.fold(v)

    def fold(self, x: Float[Array, "B T H D"]) -> Float[Array, "B N C D"]:
        x = self._pad(x, 1)
        return x.reshape(x.shape[0], -1, self.hop.stride * x.shape[2], x.shape[3])

    def unfold(self, x: Float[Array, "B N C D"]) -> Float[Array, "B T H D"]:
        return x.reshape(x.shape[0], -1, self.heads, x.shape[3])[:, : self.length]

    def fold_rows(self, x: Float[Array, "B H T"]) -> Float[Array, "B C N"]:
        x = self._pad(x, 2)
        x = x.reshape(x.shape[0], self.heads, -1, self.hop.stride)
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1, x.shape[2])

    def unfold_rows(self, x: Float[Array, "B C N"]) -> Float[Array, "B H T"]:
        x = x.reshape(x.shape[0], self.hop.stride, self.heads, -1)
        return x.transpose(0, 2, 3, 1).reshape(x.shape[0], self.heads, -1)[..., : self.length]

    def _pad(self, x: Array, axis: int) -> Array:
        if not self.padding:
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.padding)
        return jnp.pad(x, widths)

    def _first(self, doc_start: Int[Array, "B T"]) -> Int[Array, "B C N"]:
        """The first row of each row's document in its own residue."""
        stride = self.hop.stride
        start = self._pad(jnp.maximum(doc_start, 0), 1)
        start = start.reshape(start.shape[0], -1, stride).swapaxes(1, 2)
        residue = jnp.arange(stride, dtype=start.dtype)[None, :, None]
        first = jnp.maximum(-((residue - start) // stride), 0)
        return jnp.repeat(first, self.heads, axis=1)
