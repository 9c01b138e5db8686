"""Softmax attention where every row sees one interval of keys: the public functions."""

import dataclasses
import functools
import math
import numbers
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention import gpu, reference, tpu, xla
from pallas_kernels.flash_attention.pieces import Pieces
from pallas_kernels.flash_attention.reference import merge
from pallas_kernels.flash_attention.tiles import GpuTiles, Spec, Tiles, TpuTiles

__all__ = ["BACKENDS", "block_backward", "block_forward", "flash_attention", "merge", "row_delta"]

# The backends, and the tile class that each takes.
BACKENDS: dict[str, ModuleType] = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu}
NO_SUMS = (None, None, None)
MOST_OFFSET = 2**29  # positions, offsets and windows are int32
TILES: dict[str, type] = {"xla": Tiles, "tpu": TpuTiles, "gpu": GpuTiles}


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    *,
    causal: bool = True,
    window: int | None = None,
    lo: Int[Array, "B T"] | Int[Array, "B H T"] | None = None,
    hi: Int[Array, "B T"] | Int[Array, "B H T"] | None = None,
    q_offset: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    tiles: Any = None,
) -> Float[Array, "B T H E"] | tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Softmax attention of every row over one interval of keys, in linear memory.

        s_ts = scale q_t . k_s                 (soft_cap tanh(s_ts / soft_cap) with a soft cap)
        lse_t = log sum_{s seen by t} exp(s_ts)
        o_t = sum_{s seen by t} exp(s_ts - lse_t) v_s

    Row t sees key s if `lo_t <= s < hi_t`, and `s <= t + q_offset` if `causal`, and
    `s > t + q_offset - window` if there is a window. A row that sees nothing gives o = 0 and
    lse = -inf. Any lo and hi are exact; the work is least when neighbouring rows see
    neighbouring keys, since whole tiles that nobody sees are skipped.

    Args:
      q: queries; query head h reads key/value head `h // (H // K)`.
      k: keys, of q's dtype.
      v: values, of q's dtype.
      causal: whether a row sees no key later than its own position `t + q_offset`.
      window: how many keys, counted back from its own position, a row sees.
      lo: first key seen, int32; 0 if only `hi` is given.
      hi: one past the last key seen, int32; S if only `lo` is given.
      q_offset: position of the first query among the keys.
      scale: factor of the scores; D^-1/2 if None.
      soft_cap: bound of the scores.
      return_lse: whether to return (o, lse), lse in natural log, float32 (float64 for float64
        inputs). Its gradient is honoured.
      deterministic: whether two runs must agree bit for bit, at some cost in speed.
      backend: "auto" (the best for the platform compiled for), "reference", "xla", "tpu", "gpu".
      tiles: tile sizes, of the named backend's own type; None for its table.

    Returns:
      o in q's dtype, or (o, lse).

    Raises:
      ValueError: an argument breaks a rule of the above; or tiles without a named backend.
      NotImplementedError: the named backend cannot serve this call; the message says who can.

    Differentiable once, in reverse, in q, k and v. Sources: arXiv 2205.14135 (forward),
    2307.08691 (backward), 2306.01160 (intervals); the derivation is in the family's README.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    lo, hi = _intervals(q, k, lo, hi)
    spec = make_spec(q, k, v, lo, causal, window, q_offset, scale, soft_cap, deterministic)
    call = _call(spec, backend, tiles)
    axes = varying_axes(q, k, v, lo, hi)
    o, lse = _attend(call, *unify_varying((q, k, v, lo, hi), axes))
    return (o, lse) if return_lse else o


def block_forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"] | Pieces,
    v: Float[Array, "B S K E"] | Pieces,
    *,
    first_row: int = 0,
    lo: Int[Array, "B R"] | Int[Array, "B H R"] | None = None,
    hi: Int[Array, "B R"] | Int[Array, "B H R"] | None = None,
    carry: tuple[Float[Array, "B C H E"], Float[Array, "B H C"]] | None = None,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    deterministic: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
    tiles: Any = None,
) -> tuple[Float[Array, "B R H E"], Float[Array, "B H R"]]:
    """One hop of blockwise attention: continue `carry = (o, lse)` with the keys of this block.

    The arguments are those of `flash_attention`; o and lse are float32 (float64 for float64
    inputs) and equal those over the keys of all hops so far, concatenated. `out_dtype` is that of
    o where it is no carry, after the last hop. Not differentiable: see `block_backward`.

    Keys that lie in several arrays are `Pieces`. Only the R rows of q from `first_row` on are
    computed: lo, hi and the results are theirs. A carry may be of the last C of these; the others
    begin with this block.
    """
    if q.ndim == 4 and not 0 <= first_row < q.shape[1]:
        raise ValueError(f"{first_row=} must be one of the {q.shape[1]} rows of q")
    if isinstance(k, Pieces) != isinstance(v, Pieces):
        raise ValueError("k and v must both be Pieces, or neither")
    keys, values = _like(k), _like(v)
    rows = _from_row(q, first_row)
    lo, hi = _intervals(rows, keys, lo, hi)
    mask = causal, window, q_offset + first_row
    spec = make_spec(rows, keys, values, lo, *mask, scale, soft_cap, deterministic)
    spec = dataclasses.replace(spec, out_dtype=jnp.dtype(out_dtype or spec.wide))
    if carry is not None:
        o, lse = carry
        continued = _from_row(rows, max(0, spec.q_length - o.shape[1]))
        wanted = _rows(continued, values), _row(continued)
        _check_shapes({"o of carry": (o, wanted[0]), "lse of carry": (lse, wanted[1])})
    return _run("fwd", _call(spec, backend, tiles), q, k, v, lo, hi, carry)


def row_delta(
    o: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    do: Float[Array, "B T H E"],
    dlse: Float[Array, "B H T"],
) -> Float[Array, "B H T"]:
    """rowsum(do * o) - dlse in the dtype of lse: what `block_backward` takes as `delta`.

    Of `do` as it is rounded: XLA may hand on what it was before (`xla_allow_excess_precision`), and
    where a row sees few keys, delta then no longer cancels the kernel's product of do and v.
    """
    rounded = jnp.finfo(do.dtype)
    do = lax.reduce_precision(do.astype(lse.dtype), rounded.nexp, rounded.nmant)
    return jnp.sum(do * o.astype(lse.dtype), -1).swapaxes(1, 2) - dlse


def block_backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    *,
    lo: Int[Array, "B T"] | Int[Array, "B H T"] | None = None,
    hi: Int[Array, "B T"] | Int[Array, "B H T"] | None = None,
    accumulate: tuple[Array | None, Array | None, Array | None] | None = None,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    deterministic: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
    tiles: Any = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """The backward of one hop: what this block's keys add to dq, and their dk and dv.

    `lse` and `delta = rowsum(do * o) - dlse` are float32 (float64 for float64 inputs) and over the
    keys of all hops.
    `accumulate = (dq, dk, dv)` are such sums to which the gradients are added; a gradient
    without a sum (None) has `out_dtype`, by default that of q, k and v.
    """
    lo, hi = _intervals(q, k, lo, hi)
    spec = make_spec(q, k, v, lo, causal, window, q_offset, scale, soft_cap, deterministic)
    spec = dataclasses.replace(spec, out_dtype=jnp.dtype(out_dtype or spec.dtype))
    sums = zip(("dq", "dk", "dv"), accumulate or NO_SUMS, (q, k, v), strict=True)
    _check_shapes(
        {"do": (do, _rows(q, v)), "lse": (lse, _row(q)), "delta": (delta, _row(q))}
        | {f"{name} of accumulate": (x, y.shape) for name, x, y in sums if x is not None}
    )
    args = (q, k, v, lo, hi, do, lse, delta, accumulate or NO_SUMS)
    return _run("bwd", _call(spec, backend, tiles), *args)


@dataclasses.dataclass(frozen=True)
class _Call:
    spec: Spec
    backend: str
    tiles: Any


def _call(spec: Spec, backend: str, tiles: Any) -> _Call:
    if tiles is not None and backend == "auto":
        raise ValueError(f"{tiles=} belong to one backend: name it instead of backend='auto'")
    _dispatch.check_backend(backend, BACKENDS, spec)
    if tiles is not None and type(tiles) is not TILES.get(backend):
        wanted = TILES[backend].__name__ if backend in TILES else "None"
        raise ValueError(f"{tiles=} with {backend=}: it must be {wanted}")
    return _Call(spec, backend, tiles)


@functools.partial(jax.jit, static_argnums=(0, 1))  # equal calls are traced and lowered once
def _run(name: str, call: _Call, *args: Any) -> Any:
    axes = varying_axes(*jax.tree.leaves(args))
    args = unify_varying(args, axes)
    # An index that is a Python int must not become int64 inside a kernel: Mosaic refuses it.
    with jax.enable_x64(call.spec.dtype == jnp.float64):
        out = _dispatch.call(
            name, call.backend, BACKENDS, call.spec, *args, spec=call.spec, tiles=call.tiles
        )
    return unify_varying(out, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q: Array, k: Array, v: Array, lo: Array | None, hi: Array | None):
    return _run("fwd", call, q, k, v, lo, hi, None)


def _attend_fwd(call: _Call, q: Array, k: Array, v: Array, lo: Array | None, hi: Array | None):
    o, lse = _attend(call, q, k, v, lo, hi)
    return (o, lse), (q, k, v, lo, hi, o, lse)


def _attend_bwd(call: _Call, saved: tuple, cotangents: tuple[Array, Array]):
    q, k, v, lo, hi, o, lse = saved
    do, dlse = cotangents
    delta = row_delta(o, lse, do, dlse)
    dq, dk, dv = _run("bwd", call, q, k, v, lo, hi, do, lse, delta, NO_SUMS)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _like(x: Array | Pieces) -> Any:
    return x.like() if isinstance(x, Pieces) else x


def _from_row(q: Any, row: int) -> Any:
    """What the rows of q from `row` on would be."""
    if row == 0:
        return q
    return jax.ShapeDtypeStruct((q.shape[0], q.shape[1] - row, *q.shape[2:]), q.dtype)


def _rows(q: Array, v: Array) -> tuple[int, ...]:
    return *q.shape[:3], v.shape[3]


def _row(q: Array) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[1]


def _check_shapes(given: dict[str, tuple[Array, tuple[int, ...]]]) -> None:
    for name, (x, shape) in given.items():
        if x.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {x.shape}")


def _intervals(
    q: Array, k: Array, lo: Array | None, hi: Array | None
) -> tuple[Array | None, Array | None]:
    """`lo` and `hi` as int32 `[B, h, T]`, or both None."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [B, T, H, D] and [B, S, K, D], got {q.shape}, {k.shape}")
    batch, length, heads, _ = q.shape
    given = []
    for name, x in (("lo", lo), ("hi", hi)):
        if x is None:
            continue
        if x.shape not in ((batch, length), (batch, heads, length)):
            rule = f"[B, T] = {(batch, length)} or [B, H, T] = {(batch, heads, length)}"
            raise ValueError(f"{name} must be {rule}, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integer, got {x.dtype}")
        if x.dtype != jnp.int32:  # what does not fit must not wrap
            x = x.clip(0, k.shape[1])
        given.append((x if x.ndim == 3 else x[:, None]).astype(jnp.int32))
    if not given:
        return None, None
    if lo is None:
        given.insert(0, jnp.zeros_like(given[0]))
    if hi is None:
        given.append(jnp.full_like(given[0], k.shape[1]))
    shape = (batch, max(x.shape[1] for x in given), length)
    low, high = (jnp.broadcast_to(x, shape) for x in given)
    return low, high


def make_spec(
    q: Array,
    k: Array,
    v: Array,
    lo: Array | None,
    causal: bool = True,
    window: int | None = None,
    q_offset: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    deterministic: bool = False,
) -> Spec:
    """The checked `Spec` of a call, by the arguments of `flash_attention`."""
    batch, q_length, q_heads, key_width = q.shape
    _, kv_length, kv_heads, _ = k.shape
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} must agree in batch, length and heads")
    if k.shape[0] != batch or k.shape[3] != key_width:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and width")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"no axis may be empty: q {q.shape}, k {k.shape}, v {v.shape}")
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads must be a multiple of {kv_heads} key/value heads")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, value, kind in (
        ("window", window, numbers.Integral),
        ("q_offset", q_offset, numbers.Integral),
        ("scale", scale, numbers.Real),
        ("soft_cap", soft_cap, numbers.Real),
    ):
        if not isinstance(value, kind) and (value is not None or name == "q_offset"):
            rule = f"a Python {kind.__name__} number; what is traced goes into lo and hi"
            raise ValueError(f"{name}={value!r} must be {rule}")
    if abs(q_offset) > MOST_OFFSET:
        raise ValueError(f"{q_offset=} must be within {MOST_OFFSET} of 0")
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1")
    window = window and min(window, 2 * MOST_OFFSET)  # all keys
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{soft_cap=} must be positive and finite")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{scale=} must be finite")
    return Spec(
        batch=batch,
        q_length=q_length,
        kv_length=kv_length,
        q_heads=q_heads,
        kv_heads=kv_heads,
        key_width=key_width,
        value_width=v.shape[3],
        dtype=jnp.dtype(q.dtype),
        causal=causal,
        window=window,
        q_offset=q_offset,
        scale=1 / math.sqrt(key_width) if scale is None else scale,
        soft_cap=soft_cap,
        interval_heads=0 if lo is None else lo.shape[1],
        out_dtype=jnp.dtype(q.dtype),
        deterministic=deterministic,
    )
