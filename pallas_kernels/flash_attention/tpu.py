"""Flash attention on TPU: three Mosaic kernels, forward, dq, and dk with dv.

Tiles of scores lie transposed, keys down the sublanes and rows along the lanes. So a row's
limits, maximum, sum, lse and delta are one lane each of a `[1, rows]` vector that broadcasts
without a move, reductions over keys run down the sublanes, and every product has a layout that
the matrix unit takes as it is. q, do, o and dq travel as `[B, H, width, T]`, k and v as
`[B, K, S, width]`, or as `[B, K, width, S]` where a product needs them on its left.

    kernel    grid                                  stays in VMEM    streams through VMEM
    forward   B, H, row tiles, 1, steps             q, m, l, o       k, v^T of one key tile
    dq        B, H, row tiles, 1, steps             q, do, dq        k, k^T, v of one key tile
    dk, dv    B, K, key tiles, group, steps         k, v, dk, dv     q, do, lse, delta of a row tile

The schedule (which tiles `[start, stop)` each tile needs, and which of them without a mask) is
prefetched to scalar memory; `steps` is the longest range in it, known only when the kernel
starts. A step beyond its tile's own range computes nothing and names the block that the next
tile needs first, so nothing is fetched in vain and the next tile finds its block there.

A result over other keys is continued where it is made, and stays in VMEM beside the output: o and
lse are a state (m, l, o) = (lse, 1, o) from which the forward starts, with l = 0 where lse is -inf,
and a dq is added in the last step. XLA would join either in a program of its own, and may put a
move of the ring beside that, which is too short to hide it, instead of beside a kernel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._pallas import pl, pltpu, unify_varying, varying_axes
from pallas_kernels.flash_attention.intervals import Bounds, column_bounds, row_bounds, row_limits
from pallas_kernels.flash_attention.pieces import whole
from pallas_kernels.flash_attention.tiles import Spec, TpuTiles, tpu_tiles

LOG2E = math.log2(math.e)
SCHEDULE_BYTES = 2**19  # of scalar memory
NN, NT = ((1,), (0,)), ((1,), (1,))  # contracted axes of a product


def unsupported(spec: Spec) -> str | None:
    """Why these kernels cannot serve `spec`, or None."""
    if spec.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels take bfloat16 and float32, not {spec.dtype}"
    tiles = tpu_tiles(spec)
    count = max(-(-spec.q_length // tiles.q), -(-spec.kv_length // tiles.kv))
    size = 16 * count * (spec.batch * spec.interval_heads or 1)
    if size > SCHEDULE_BYTES:
        return f"the intervals' schedule needs {size} > {SCHEDULE_BYTES} bytes of scalar memory"
    return None


def fwd(q, k, v, lo, hi, carry, *, spec: Spec, tiles: TpuTiles | None = None):
    """See `xla.fwd`."""
    q, k, v, carry = whole(q, k, v, carry, spec)
    tiles = (tiles or tpu_tiles(spec)).fit(spec)
    o, lse = _launch(
        _forward_kernel,
        spec,
        tiles,
        "row",
        row_bounds(spec, lo, hi, tiles),
        _limits(lo, hi),
        [("row", _width_first(q)), ("key", _heads_first(k)), ("key^T", _width_first(v))],
        [
            ("row", spec.q_heads, spec.value_width, spec.out_dtype),
            ("row", spec.q_heads, 1, jnp.float32),
        ],
        scratch=[(1, tiles.q), (1, tiles.q), (spec.value_width, tiles.q)],
        carried=[] if carry is None else [_width_first(carry[0]), carry[1][:, :, None]],
    )
    return o.transpose(0, 3, 1, 2), lse[:, :, 0]


def bwd(q, k, v, lo, hi, do, lse, delta, accumulate, *, spec: Spec, tiles: TpuTiles | None = None):
    """See `xla.bwd`."""
    tiles = (tiles or tpu_tiles(spec)).fit(spec)
    dtypes = [spec.out_dtype if x is None else jnp.float32 for x in accumulate]
    dq_before, *dk_dv_before = accumulate
    # A row without keys has lse -inf; all of its scores are masked, whatever is subtracted.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse) * LOG2E
    rows = [
        ("row", _width_first(q)),
        ("row", _width_first(do.astype(spec.dtype))),
        ("row", lse[:, :, None]),
        ("row", delta[:, :, None]),
    ]
    keys = [("key", _heads_first(k)), ("key", _heads_first(v))]
    (dq,) = _launch(
        _dq_kernel,
        spec,
        tiles,
        "row",
        row_bounds(spec, lo, hi, tiles),
        _limits(lo, hi),
        [*rows, *keys, ("key^T", _width_first(k))],
        [("row", spec.q_heads, spec.key_width, dtypes[0])],
        scratch=[(spec.key_width, tiles.q)],
        carried=[] if dq_before is None else [_width_first(dq_before)],
    )
    dk, dv = _launch(
        _dk_dv_kernel,
        spec,
        tiles,
        "key",
        column_bounds(spec, lo, hi, tiles),
        _limits(lo, hi),
        [*rows, *keys],
        [
            ("key", spec.kv_heads, spec.key_width, dtypes[1]),
            ("key", spec.kv_heads, spec.value_width, dtypes[2]),
        ],
        scratch=[(tiles.kv, spec.key_width), (tiles.kv, spec.value_width)],
    )
    dk_dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    dk_dv = (g if a is None else a + g for a, g in zip(dk_dv_before, dk_dv, strict=True))
    return (dq.transpose(0, 3, 1, 2), *dk_dv)


def _forward_kernel(spec: Spec, tile: "_Tile", q, k, v_t, *refs):
    *carried, o, lse, m, l, acc = refs

    @pl.when(tile.first)
    def _():
        if carried:
            o_before, lse_before = carried
            m[...] = lse_before[...] * LOG2E
            l[...] = jnp.where(lse_before[...] == -jnp.inf, 0.0, 1.0)
            acc[...] = o_before[...]
        else:
            m[...] = jnp.full_like(m, -jnp.inf)
            l[...] = jnp.zeros_like(l)
            acc[...] = jnp.zeros_like(acc)

    @tile.compute
    def _(keys: slice, masked: bool):
        s, _ = tile.scores(q[...], k[keys], keys, masked)
        m_old = m[...]
        m_new = jnp.maximum(m_old, s.max(0, keepdims=True))
        shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
        p, shrink = jnp.exp2(s - shift), jnp.exp2(m_old - shift)
        m[...] = m_new
        l[...] = shrink * l[...] + p.sum(0, keepdims=True)
        acc[...] = shrink * acc[...] + _dot(v_t[:, keys], p.astype(spec.dtype), NN)

    @pl.when(tile.last)
    def _():
        empty = l[...] == 0
        total = jnp.where(empty, 1.0, l[...])
        o[...] = (acc[...] / total).astype(o.dtype)
        lse[...] = jnp.where(empty, -jnp.inf, (m[...] + jnp.log2(total)) / LOG2E)


def _dq_kernel(spec: Spec, tile: "_Tile", q, do, lse, delta, k, v, k_t, *refs):
    *carried, dq, acc = refs

    @pl.when(tile.first)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @tile.compute
    def _(keys: slice, masked: bool):
        _, ds = tile.gradients(q, do, lse, delta, k, v, keys, masked)
        acc[...] += _dot(k_t[:, keys], ds, NN)

    @pl.when(tile.last)
    def _():
        own = spec.scale * acc[...]
        dq[...] = (carried[0][...] + own if carried else own).astype(dq.dtype)


def _dk_dv_kernel(spec: Spec, tile: "_Tile", q, do, lse, delta, k, v, dk, dv, dk_acc, dv_acc):
    @pl.when(tile.first)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @tile.compute
    def _(keys: slice, masked: bool):
        p, ds = tile.gradients(q, do, lse, delta, k, v, keys, masked)
        dv_acc[keys] += _dot(p, do[...], NT)
        dk_acc[keys] += _dot(ds, q[...], NT)

    @pl.when(tile.last)
    def _():
        dk[...] = (spec.scale * dk_acc[...]).astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)


class _Tile:
    """One grid step: which tile of scores it is, whether it runs, and its scores."""

    def __init__(self, spec: Spec, tiles: TpuTiles, grid: "_Grid", table: Any, limits: Sequence):
        ids = tuple(pl.program_id(a) for a in range(5))
        start, stop, full_start, full_stop = grid.entry(table, ids)
        own, other = ids[2], start + ids[4]
        self.first = (ids[3] == 0) & (ids[4] == 0)
        self.last = (ids[3] == grid.inner - 1) & (ids[4] == pl.num_programs(4) - 1)
        self.runs = other < stop
        self.free = (full_start <= other) & (other < full_stop)
        self.spec, self.tiles, self.limits = spec, tiles, limits
        self.row, self.key = (own, other) if grid.stationary == "row" else (other, own)

    def compute(self, chunk: Callable[[slice, bool], None]) -> None:
        """Run `chunk` over the keys of this tile, with a mask if it needs one."""

        def run(masked: bool) -> None:
            for start in range(0, self.tiles.kv, self.tiles.chunk):
                chunk(slice(start, start + self.tiles.chunk), masked)

        pl.when(self.runs & self.free)(lambda: run(False))
        pl.when(self.runs & ~self.free)(lambda: run(True))

    def seen(self, keys: slice) -> jax.Array:
        """The mask `[chunk, rows]`."""
        rows = self.row * self.tiles.q + lax.broadcasted_iota(jnp.int32, (1, self.tiles.q), 1)
        lo, hi = (x[...] for x in self.limits) if self.limits else (None, None)
        low, high = row_limits(self.spec, rows, lo, hi)
        shape = (self.tiles.chunk, self.tiles.q)
        position = self.key * self.tiles.kv + keys.start + lax.broadcasted_iota(jnp.int32, shape, 0)
        return (low <= position) & (position < high)

    def scores(self, q: jax.Array, k: jax.Array, keys: slice, masked: bool):
        """Scores `[chunk, rows]` in units of log 2, and the soft cap's slope if there is one."""
        spec, slope = self.spec, None
        s = _dot(k, q, NN)
        if spec.soft_cap is None:
            s *= spec.scale * LOG2E
        else:
            t = jnp.tanh(s * (spec.scale / spec.soft_cap))
            s, slope = t * (spec.soft_cap * LOG2E), 1 - t * t
        return (jnp.where(self.seen(keys), s, -jnp.inf) if masked else s), slope

    def gradients(self, q, do, lse, delta, k, v, keys: slice, masked: bool):
        """p and ds `[chunk, rows]` in the input dtype; ds still lacks the factor `scale`."""
        s, slope = self.scores(q[...], k[keys], keys, masked)
        p = jnp.exp2(s - lse[...])
        ds = p * (_dot(v[keys], do[...], NN) - delta[...])
        ds = ds if slope is None else ds * slope
        return p.astype(self.spec.dtype), ds.astype(self.spec.dtype)


class _Grid:
    """The order of the programs, and which blocks each of their steps holds.

    A program has one tile of `stationary`, "row" or "key", and steps through the tiles of the
    other kind that its schedule names: ids are (b, head // inner, tile, head % inner, step).
    """

    def __init__(self, spec: Spec, stationary: str, bounds: Bounds):
        self.spec, self.stationary = spec, stationary
        self.inner = spec.group if stationary == "key" else 1
        self.shape = bounds.start.shape
        self.programs = (spec.batch, spec.q_heads // self.inner, self.shape[2], self.inner)

    def entry(self, table: Any, ids: Sequence) -> tuple:
        """(start, stop, full_start, full_stop) of a program."""
        b, h, n = ids[0], ids[1] * self.inner + ids[3], ids[2]
        batch, heads, count = self.shape
        b, h = (b if batch > 1 else 0), (h if heads > 1 else 0)
        first = 4 * ((b * heads + h) * count + n)
        return tuple(table[first + c] for c in range(4))

    def following(self, ids: Sequence) -> tuple:
        """The program that runs after this one; the last one itself."""
        flat = 0
        for extent, index in zip(self.programs, ids, strict=True):
            flat = flat * extent + index
        flat = jnp.minimum(flat + 1, math.prod(self.programs) - 1)
        digits = []
        for extent in reversed(self.programs):
            flat, digit = lax.div(flat, extent), lax.rem(flat, extent)
            digits.append(digit)
        return tuple(reversed(digits))

    def block(self, kind: str, shape: Sequence[int], ids: Sequence, table: Any) -> tuple:
        """Block index in an array of kind "row" `[B, H, width, T]`, "key" or "key^T"."""
        *program, step = ids
        tile = program[2]
        if not kind.startswith(self.stationary):
            start, stop, _, _ = self.entry(table, program)
            busy = start + step < stop
            after = self.following(program)
            tile = jnp.where(busy, start + step, self.entry(table, after)[0])
            program = [jnp.where(busy, x, y) for x, y in zip(program, after, strict=True)]
        b, h = program[0], program[1] * self.inner + program[3]
        if kind.startswith("key"):
            h = lax.div(h, self.spec.group)
        b, h = (b if shape[0] > 1 else 0), (h if shape[1] > 1 else 0)
        return (b, h, tile, 0) if kind == "key" else (b, h, 0, tile)


def _launch(
    kernel: Callable[..., None],
    spec: Spec,
    tiles: TpuTiles,
    stationary: str,
    bounds: Bounds,
    limits: Sequence[tuple[str, jax.Array]],
    inputs: Sequence[tuple[str, jax.Array]],
    outputs: Sequence[tuple[str, int, int, Any]],
    scratch: Sequence[tuple[int, int]],
    carried: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Run `kernel(spec, tile, *inputs, *carried, *outputs, *scratch)` over the schedule `bounds`.

    Inputs are (kind, array), outputs (kind, heads, width, dtype), kinds those of `_Grid.block`.
    `carried` are the arrays that the first of the outputs continue, each of its output's kind.
    """
    grid = _Grid(spec, stationary, bounds)
    before = [(kind, x) for x, (kind, *_) in zip(carried, outputs, strict=False)]
    names = [kind for kind, _ in (*limits, *inputs, *before)]
    arrays = [_pad(kind, x, tiles) for kind, x in (*limits, *inputs, *before)]
    steps = jnp.maximum((bounds.stop - bounds.start).max(), 1)
    table = jnp.stack(bounds, axis=-1).reshape(-1)
    axes = varying_axes(steps, table, *arrays)
    steps, table, *arrays = unify_varying((steps, table, *arrays), axes)

    def block_spec(kind: str, shape: Sequence[int]) -> pl.BlockSpec:
        size = tiles.q if kind == "row" else tiles.kv
        block = (size, shape[3]) if kind == "key" else (shape[2], size)
        return pl.BlockSpec((None, None, *block), lambda *a: grid.block(kind, shape, a[:-1], a[-1]))

    def result(kind: str, heads: int, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        length = _padded(kind, spec.q_length if kind == "row" else spec.kv_length, tiles)
        shape = (length, width) if kind == "key" else (width, length)
        varying = jax.typeof(table).manual_axis_type
        return jax.ShapeDtypeStruct((spec.batch, heads, *shape), dtype, manual_axis_type=varying)

    def body(table: Any, *refs: Any) -> None:
        tile = _Tile(spec, tiles, grid, table, refs[: len(limits)])
        kernel(spec, tile, *refs[len(limits) :])

    results = [result(*output) for output in outputs]
    pairs = spec.q_length * min(spec.kv_length, spec.window or spec.kv_length)
    pairs *= spec.batch * spec.q_heads
    pairs //= 2 if spec.causal else 1
    out = pl.pallas_call(
        body,
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*grid.programs, steps),
            in_specs=[block_spec(k, x.shape) for k, x in zip(names, arrays, strict=True)],
            out_specs=[block_spec(o[0], r.shape) for o, r in zip(outputs, results, strict=True)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2,
        ),
        cost_estimate=pl.CostEstimate(
            # 2, 7 and 5 products. By the 3 and 4 that dq and dk and dv really take, XLA schedules
            # rings that need more memory.
            flops=2 * (len(inputs) - len(outputs) + 1) * pairs * spec.key_width,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
        ),
        name="flash_attention" + kernel.__name__,
    )(table, *arrays)
    lengths = [spec.q_length if o[0] == "row" else spec.kv_length for o in outputs]
    return [
        lax.slice_in_dim(x, 0, length, axis=2 if o[0] == "key" else 3)
        for x, o, length in zip(out, outputs, lengths, strict=True)
    ]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _width_first(x: jax.Array) -> jax.Array:
    """`[B, n, h, width]` to `[B, h, width, n]`."""
    return x.transpose(0, 2, 3, 1)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


def _limits(lo: jax.Array | None, hi: jax.Array | None) -> list[tuple[str, jax.Array]]:
    return [("row", x[:, :, None]) for x in (lo, hi) if x is not None]


def _padded(kind: str, length: int, tiles: TpuTiles) -> int:
    return length + -length % (tiles.q if kind == "row" else tiles.kv)


def _pad(kind: str, x: jax.Array, tiles: TpuTiles) -> jax.Array:
    axis = 2 if kind == "key" else 3
    missing = _padded(kind, x.shape[axis], tiles) - x.shape[axis]
    if missing == 0:
        return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
