"""Flash attention on Hopper GPUs (sm_90a) by Mosaic GPU: padding, bounds and the choice of kernels.

The kernels are in `gpu_forward.py` and `gpu_backward.py`. They read and write `[B, T, H, D]` where
it lies; only lengths that are no whole tiles and head widths that are not 64, 128 or 256 are
padded here. One backward kernel computes dk, dv and, by reductions in float32, dq; where the
result must be deterministic or a head is wider than 128, dq has a kernel of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._pallas import unify_varying, varying_axes
from pallas_kernels.flash_attention.gpu_backward import backward_keys, backward_rows
from pallas_kernels.flash_attention.gpu_common import LOG2E, Visible
from pallas_kernels.flash_attention.gpu_forward import forward
from pallas_kernels.flash_attention.intervals import column_bounds, row_bounds, row_limits
from pallas_kernels.flash_attention.tiles import GPU_TILES, GpuTiles, KernelTiles, Spec

WIDTHS = tuple(GPU_TILES)  # of heads, after padding

Carry = tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]
Gradients = tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]


def unsupported(spec: Spec) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if spec.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype={spec.dtype}: the tensor cores multiply bfloat16 and float16"
    width = max(spec.key_width, spec.value_width)
    if width > WIDTHS[-1]:
        return f"head width {width} is above {WIDTHS[-1]}"
    if not spec.scale > 0:
        return f"scale={spec.scale} is not positive"
    if min(spec.batch, spec.q_length, spec.kv_length) < 1:
        return "there are no rows or no keys"
    return None


def fwd(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    lo: Int[Array, "B h T"] | None,
    hi: Int[Array, "B h T"] | None,
    carry: Carry | None,
    *,
    spec: Spec,
    tiles: GpuTiles | None = None,
    interpret: Any = None,
) -> Carry:
    """See `xla.fwd`. `interpret`: parameters of the interpreter, for tests."""
    tile = (tiles or default_tiles(spec)).forward
    axes = varying_axes(q, k, v, lo, hi, *(carry or ()))
    visible = _visible(spec, lo, hi, tile, row_bounds)
    if carry is not None:
        o, lse = carry
        carry = _pad(o, tile.q), _pad(lse, tile.q, axis=2, value=-jnp.inf)
    wide = _table_width(spec)
    q, k, v = _pad(q, tile.q, wide), _pad(k, tile.kv, wide), _pad(v, tile.kv)
    o, lse = forward(q, k, v, visible, carry, spec=spec, tiles=tile, interpret=interpret)
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
    accumulate: Gradients | None,
    *,
    spec: Spec,
    tiles: GpuTiles | None = None,
    interpret: Any = None,
) -> Gradients:
    """See `xla.bwd`. The interpreter knows no reductions: there it is always deterministic."""
    tiles = tiles or default_tiles(spec)
    axes = varying_axes(q, k, v, lo, hi, do, lse, delta, *(accumulate or ()))
    reduces = not (spec.deterministic or tiles.values is not None or interpret is not None)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # 2^(s - inf) = 0: such rows vanish
    rows, keys = tiles.rows.q, tiles.keys.kv  # multiples of the other kernels' tiles
    wide = _table_width(spec)
    q, do = _pad(q, rows, wide), _pad(do.astype(q.dtype), rows)
    k, v = _pad(k, keys, wide), _pad(v, keys)
    lse = _pad(lse, rows, axis=2, value=jnp.inf)
    delta = _pad(delta, rows, axis=2)
    sums = {}
    if accumulate is not None:
        sums = {
            "dq": _pad(accumulate[0], rows, wide),
            "dk": _pad(accumulate[1], keys, wide),
            "dv": _pad(accumulate[2], keys),
        }
    found = {}
    if reduces:
        # Tied to the keys, else XLA makes the zeros of all hops of a ring at once, and keeps them.
        zero, k = lax.optimization_barrier((jnp.zeros((), jnp.float32), k))
        dq = jax.new_ref(sums.pop("dq") if sums else jnp.full(q.shape, zero))
        passes = ((("dk", "dv"), tiles.keys),)
    else:
        dq = None
        found["dq"] = backward_rows(
            q, k, v, _visible(spec, lo, hi, tiles.rows, row_bounds), do, lse, delta,
            sums.pop("dq", None), spec=spec, tiles=tiles.rows, interpret=interpret,
        )  # fmt: skip
        passes = (
            ((("dk", "dv"), tiles.keys),)
            if tiles.values is None
            else ((("dk",), tiles.keys), (("dv",), tiles.values))
        )
    for want, tile in passes:
        visible = _visible(spec, lo, hi, tile, column_bounds)
        some = {x: sums[x] for x in want if x in sums}
        out = backward_keys(
            q, k, v, visible, do, lse, delta, dq, some,
            want=want, spec=spec, tiles=tile, interpret=interpret,
        )  # fmt: skip
        found |= dict(zip(want, out, strict=True))
    if dq is not None:
        summed = jax.freeze(dq)
        found["dq"] = summed if accumulate is not None else summed.astype(spec.out_dtype)
    dq, dk, dv = (
        found[name][:, :length, :, :width]
        for name, length, width in (
            ("dq", spec.q_length, spec.key_width),
            ("dk", spec.kv_length, spec.key_width),
            ("dv", spec.kv_length, spec.value_width),
        )
    )
    return unify_varying((dq, dk, dv), axes)


def default_tiles(spec: Spec) -> GpuTiles:
    """The measured tiles for the head width."""
    return GPU_TILES[_table_width(spec)]


def _table_width(spec: Spec) -> int:
    return _padded_width(max(spec.key_width, spec.value_width))


def _padded_width(width: int) -> int:
    return next(w for w in WIDTHS if w >= width)


def _pad(x: Array, size: int, width: int | None = None, *, axis: int = 1, value: float = 0):
    """Whole tiles of `size` along `axis`; heads get `width`, or the next width of the table."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    if x.ndim == 4:
        padding[3] = (0, (width or _padded_width(x.shape[3])) - x.shape[3])
    return (
        x if not any(after for _, after in padding) else jnp.pad(x, padding, constant_values=value)
    )


def _visible(spec: Spec, lo, hi, tile: KernelTiles, bounds_of) -> Visible | None:
    """The intervals as the kernels read them; None without, as causal and window are computed."""
    if lo is None:
        return None
    rows = jnp.arange(spec.q_length, dtype=jnp.int32)[None, None]
    low, high = row_limits(spec, rows, lo, hi)
    bounds = jnp.stack(bounds_of(spec, lo, hi, tile), axis=-1)
    return Visible(bounds, _pad(low, tile.q, axis=2), _pad(high, tile.q, axis=2))
