"""Flash attention on Hopper GPUs (sm_90a) by Mosaic GPU: padding, bounds and the choice of kernels.

The kernels are in `gpu_forward.py` and `gpu_backward_*.py`. They read and write `[B, T, H, D]`
where it lies; head widths that are not 64, 128 or 256 and, in the backward, lengths that are no
whole tiles are padded here. One backward kernel computes dk, dv and, by reductions in float32,
dq; where the result must be deterministic or a head is wider than 128, dq has one of its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import not_hopper
from pallas_kernels._pallas import forget_varying, unify_varying, varying_axes
from pallas_kernels.flash_attention.gpu_backward_keys import backward_keys
from pallas_kernels.flash_attention.gpu_backward_roles import backward_keys_by_role
from pallas_kernels.flash_attention.gpu_backward_rows import backward_rows
from pallas_kernels.flash_attention.gpu_common import LOG2E, ROWS, Visible, probability_scale
from pallas_kernels.flash_attention.gpu_forward import forward
from pallas_kernels.flash_attention.intervals import column_bounds, row_bounds, row_limits
from pallas_kernels.flash_attention.pieces import Pieces, whole
from pallas_kernels.flash_attention.tiles import (
    GPU_TILES,
    GpuTiles,
    KernelTiles,
    Spec,
    gpu_tiles,
    padded_width,
)
from pallas_kernels.flash_attention.xla import Carry, Gradients, Sums

WIDTHS = tuple(GPU_TILES)  # of heads, after padding


def unsupported(spec: Spec) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype={spec.dtype}: the tensor cores multiply bfloat16 and float16"
    width = max(spec.key_width, spec.value_width)
    if width > WIDTHS[-1]:
        return f"head width {width} is above {WIDTHS[-1]}"
    if not spec.scale > 0:
        return f"scale={spec.scale} is not positive"
    return not_hopper()


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"] | Pieces,
    v: Float[Array, "B S K E"] | Pieces,
    lo: Int[Array, "B h R"] | None,
    hi: Int[Array, "B h R"] | None,
    carry: Carry | None,
    *,
    spec: Spec,
    tiles: GpuTiles | None = None,
    interpret: Any = None,
) -> Carry:
    """See `xla.fwd`. `interpret`: parameters of the interpreter, for tests."""
    tile = (tiles or _tiles(spec)).forward
    axes = varying_axes(*jax.tree.leaves((q, k, v, lo, hi, carry)))
    skip = q.shape[1] - spec.q_length
    new = 0 if carry is None else spec.q_length - carry[0].shape[1]
    if new % tile.q or (isinstance(k, Pieces) and k.size % tile.kv):
        q, k, v, carry = whole(q, k, v, carry, spec)
        skip = 0
    visible = _visible(spec, lo, hi, tile, row_bounds)
    if carry is not None:
        o, lse = (x.astype(jnp.float32) for x in carry)
        carry = _pad(o, tile.q), _pad(lse, tile.q, axis=2, value=-jnp.inf)
    wide = _table_width(spec)
    # What TMA alone reads and writes needs no whole tiles.
    plain = carry is not None or spec.out_dtype != q.dtype or padded_width(spec.value_width) != wide
    whole_tiles = skip + spec.q_length + -spec.q_length % tile.q
    q = _pad(q, whole_tiles if plain else _box(q, ROWS), wide)
    keys = _box(k.arrays[0] if isinstance(k, Pieces) else k, tile.kv)
    k, v = _each(k, lambda x: _pad(x, keys, wide)), _each(v, lambda x: _pad(x, keys))
    o, lse = forward(q, k, v, visible, carry, skip=skip, spec=spec, tiles=tile, interpret=interpret)
    o, lse = o[:, : spec.q_length, :, : spec.value_width], lse[..., : spec.q_length]
    return unify_varying((o, lse), axes)


def bwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    lo: Int[Array, "B h T"] | None,
    hi: Int[Array, "B h T"] | None,
    do: Float[Array, "B T H E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    accumulate: Sums,
    *,
    spec: Spec,
    tiles: GpuTiles | None = None,
    interpret: Any = None,
) -> Gradients:
    """See `xla.bwd`. The interpreter knows no reductions: there it must be deterministic."""
    tiles = tiles or _tiles(spec)
    axes = varying_axes(q, k, v, lo, hi, do, lse, delta, *accumulate)
    scale = math.log2(probability_scale(spec))
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E - scale)  # 2^(s - inf) = 0: they vanish
    rows, keys = tiles.rows.q, tiles.keys.kv  # multiples of the other kernels' tiles
    wide = _table_width(spec)
    q, do = _pad(q, rows, wide), _pad(do.astype(q.dtype), rows)
    k, v = _pad(k, keys, wide), _pad(v, keys)
    lse = _pad(lse, rows, axis=2, value=jnp.inf)
    minus_delta = _pad(-delta, rows, axis=2)
    sums = {
        name: _pad(x, size, width)
        for name, x, size, width in zip(
            ("dq", "dk", "dv"), accumulate, (rows, keys, keys), (wide, wide, None), strict=True
        )
        if x is not None
    }

    def by_keys(dq: Any) -> tuple[Array, Array]:
        visible = _visible(spec, lo, hi, tiles.keys, column_bounds)
        some = {name: x for name, x in sums.items() if name != "dq"}
        args = (q, k, v, visible, do, lse, minus_delta)
        how = {"spec": spec, "tiles": tiles.keys, "interpret": interpret}
        if tiles.passes == "roles":
            written = backward_keys_by_role(*args, some, **how)
        else:
            written = backward_keys(*args, dq, some, **how)
        return written if len(written) == 2 else (written[0][0], written[0][1])

    if tiles.passes == "together" and not spec.deterministic:
        if "dq" in sums:
            ref = jax.new_ref(forget_varying(sums["dq"]))
        else:  # tied to this call, else XLA makes the zeros of several calls at once
            zero, lse = lax.optimization_barrier((jnp.zeros((), jnp.float32), lse))
            ref = jax.new_ref(jnp.full(q.shape, zero))
        dk, dv = by_keys(ref)
        dq = jax.freeze(ref)
        dq = dq if "dq" in sums else dq.astype(spec.out_dtype)
    else:
        visible = _visible(spec, lo, hi, tiles.rows, row_bounds)
        dq = backward_rows(
            q, k, v, visible, do, lse, minus_delta, sums.get("dq"),
            spec=spec, tiles=tiles.rows, interpret=interpret,
        )  # fmt: skip
        dk, dv = by_keys(None)
    dq, dk, dv = (
        x[:, :length, :, :width]
        for x, length, width in (
            (dq, spec.q_length, spec.key_width),
            (dk, spec.kv_length, spec.key_width),
            (dv, spec.kv_length, spec.value_width),
        )
    )
    return unify_varying((dq, dk, dv), axes)


def _tiles(spec: Spec) -> GpuTiles:
    return gpu_tiles(_table_width(spec))


def _table_width(spec: Spec) -> int:
    return padded_width(max(spec.key_width, spec.value_width))


def _pad(x: Array, size: int, width: int | None = None, *, axis: int = 1, value: float = 0):
    """Whole tiles of `size` along `axis`; heads get `width`, or the next width of the table."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    if x.ndim == 4:
        padding[3] = (0, (width or padded_width(x.shape[3])) - x.shape[3])
    return (
        x if not any(after for _, after in padding) else jnp.pad(x, padding, constant_values=value)
    )


def _each(x: Array | Pieces, pad: Callable[[Array], Array]) -> Array | Pieces:
    if isinstance(x, Pieces):
        return x._replace(arrays=[pad(array) for array in x.arrays])
    return pad(x)


def _box(x: Array, size: int) -> int:
    """To what length TMA needs `x` padded to read it `size` rows at a time."""
    return max(size, x.shape[1] + -x.shape[1] % 8)


def _visible(spec: Spec, lo, hi, tile: KernelTiles, bounds_of) -> Visible | None:
    """The intervals as the kernels read them; None without, as causal and window are computed."""
    if lo is None:
        return None
    rows = jnp.arange(spec.q_length, dtype=jnp.int32)[None, None]
    low, high = row_limits(spec, rows, lo, hi)
    bounds = bounds_of(spec, lo, hi, tile)
    return Visible(bounds, _pad(low, tile.q, axis=2), _pad(high, tile.q, axis=2))
