"""`longctx tune-device`: measure tile sizes on this device and write the table of the best."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from longctx.cli import parse
from longctx.device.check import milliseconds
from longctx.errors import UserError
from longctx.provenance import write_rows
from pallas_kernels import _tuned
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention import tiles as flash
from pallas_kernels.flash_attention.gpu_common import SMEM_BYTES
from pallas_kernels.lightning_attention import gpu as lightning_gpu
from pallas_kernels.lightning_attention import lightning_attention
from pallas_kernels.lightning_attention import tiles as lightning

Measure = Callable[[Callable[..., Any], Sequence[jax.Array]], float]  # milliseconds of a call


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Measure tile sizes of the kernels on this device and write the table of the best."""

    # The table; where it lies by default, the kernels of later processes read it.
    table: Path = _tuned.PATH
    # Where every measurement goes.
    out: Path = Path("runs/tune-device.jsonl")
    # Rows, tokens and heads of the timed calls.
    batch: int = 4
    tokens: int = 8192
    heads: int = 16
    # Widths of heads.
    widths: tuple[int, ...] = (64, 128, 256)


def tune_device(arguments: Sequence[str]) -> None:
    """`longctx tune-device [--table FILE]`."""
    options = parse(TuneOptions, "tune-device", arguments)
    device = jax.devices()[0]
    if device.platform not in ("gpu", "tpu"):
        raise UserError(f"only GPUs and TPUs have tiles to tune, not {device.device_kind}")
    tuner = Tuner(options, milliseconds)
    try:
        tables = tuner.gpu() if device.platform == "gpu" else tuner.tpu()
    finally:
        write_rows(options.out, tuner.rows)
    _tuned.write_tuned(options.table, device.device_kind, tables)
    Console().print(_table(tuner.rows, f"{device.device_kind}: {options.table}"))


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in ("for", "part", "tiles", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for row in rows:
        shown = f"{row['ms']:.3f}" if "ms" in row else f"refused: {row['refused'][:60]}"
        tiles = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
        table.add_row(row["for"], row["part"], tiles, shown)
    return table


class Tuner:
    """Measures candidates; `rows` holds a row for each.

    The entries that `gpu` and `tpu` return, by family, are those of `_tuned.write_tuned`.
    """

    def __init__(self, options: TuneOptions, measure: Measure):
        self.options, self.measure = options, measure
        self.rows: list[dict[str, Any]] = []

    def gpu(self) -> dict[str, dict[str, Any]]:
        """Tiles of flash attention by width, prices of lightning attention."""
        found = {f"gpu {w}": dataclasses.asdict(self.flash_gpu(w)) for w in self.options.widths}
        prices = dataclasses.asdict(self.lightning_prices(jax.devices()[0].core_count))
        return {"flash_attention": found, "lightning_attention": {"gpu": prices}}

    def tpu(self) -> dict[str, dict[str, Any]]:
        """Tiles of both families by width and dtype."""
        tables: dict[str, dict[str, Any]] = {"flash_attention": {}, "lightning_attention": {}}
        for width, dtype in itertools.product(self.options.widths, (jnp.bfloat16, jnp.float32)):
            arrays = self.draw(width, dtype)
            sizes = itertools.product((512, 1024, 2048), (512, 1024, 2048), (256, 512))
            for family, key, call, candidates in (
                (
                    "flash_attention",
                    flash.tpu_key(width, jnp.dtype(dtype)),
                    flash_call,
                    [flash.TpuTiles(*size) for size in sizes],
                ),
                (
                    "lightning_attention",
                    lightning.tpu_key(width, dtype),
                    lightning_call,
                    [
                        lightning.TpuTiles(chunk, block)
                        for chunk in (128, 256)
                        for block in (512, 1024, 2048)
                    ],
                ),
            ):
                calls = [(tiles, call("tpu", tiles)) for tiles in candidates]
                best = self.best(f"{family}, {key}", "gradients", calls, arrays)
                tables[family][key] = dataclasses.asdict(best)
        return tables

    def flash_gpu(self, width: int) -> flash.GpuTiles:
        """First the forward, then dk and dv, then dq where it has its own kernel."""
        arrays, tiles = self.draw(width), flash.GPU_TILES[width]
        for part, candidates in (
            ("forward", forward_tiles(width)),
            ("gradients", backward_tiles(width)),
            ("deterministic", row_tiles(width)),
        ):
            choices = [tiles]
            for fields in candidates:
                try:
                    choices.append(dataclasses.replace(tiles, **fields))
                except ValueError:  # they do not fit the tiles chosen so far
                    continue
            calls = [(choice, flash_call("gpu", choice, part)) for choice in dict.fromkeys(choices)]
            tiles = self.best(f"flash_attention, width {width}", part, calls, arrays)
        return tiles

    def lightning_prices(self, multiprocessors: int) -> lightning.Prices:
        """The prices of `lightning.gpu_tiles`, measured as they are defined."""
        chunks, width = 4 * self.options.tokens // 64, 128  # long, since heads are few

        def microseconds(heads: int, tiles: lightning.GpuTiles, states: bool = False) -> float:
            shape = (1, chunks * 64, heads, width)
            x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
            call = state_call(tiles) if states else lightning_call("gpu", tiles, "forward")
            ms = self.measure(call, [x] * 4)
            part = f"{'states' if states else 'forward'}, {heads} heads"
            self.note("lightning_attention", part, tiles, ms=ms)
            return ms * 1e3

        def price(workers: int, states: bool = False) -> tuple[float, float]:
            tiles = lightning.GpuTiles(segments=1, workers=workers, stages=2)
            full = multiprocessors * workers // 2  # a block has 64 columns per worker
            alone, each = (microseconds(n, tiles, states) / chunks for n in (1, full))
            return alone, each

        free = lightning.Prices(multiprocessors, price(1), price(2), price(2, states=True), 0.0)
        split = lightning.GpuTiles(segments=8, workers=2, stages=2)
        rest = microseconds(16, split) - free.of(split, 16, chunks, [width // 64])
        return dataclasses.replace(free, segment=max(rest, 0.0) / split.segments)

    def draw(self, width: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
        """Random q, k, v and do."""
        shape = (self.options.batch, self.options.tokens, self.options.heads, width)
        keys = jax.random.split(jax.random.key(0), 4)
        return [jax.random.normal(key, shape).astype(dtype) for key in keys]

    def best[Tiles](
        self,
        entry: str,
        part: str,
        calls: Iterable[tuple[Tiles, Callable[..., Any]]],
        arrays: Sequence[jax.Array],
    ) -> Tiles:
        """The tiles of the fastest of the calls."""
        times: list[tuple[float, Tiles]] = []
        for tiles, call in calls:
            try:
                ms = self.measure(call, arrays)
            except (RuntimeError, ValueError, TypeError) as refusal:  # as compilers raise them
                self.note(entry, part, tiles, refused=str(refusal)[:300])
            else:
                self.note(entry, part, tiles, ms=ms)
                times.append((ms, tiles))
        if not times:
            raise UserError(f"no tiles run for {entry} ({part}); see {self.options.out}")
        return min(times, key=lambda pair: pair[0])[1]

    def note(self, entry: str, part: str, tiles: Any, **found: Any) -> None:
        """Keep a row, and show it."""
        row = {"for": entry, "part": part, "tiles": dataclasses.asdict(tiles), **found}
        self.rows.append(row)
        print(*row.values(), flush=True)


def flash_call(backend: str, tiles: Any, part: str = "gradients") -> Callable[..., Any]:
    """(q, k, v, do) -> the output ("forward") or the gradients of causal attention."""
    deterministic = part == "deterministic"

    def attend(q, k, v):
        return flash_attention(q, k, v, backend=backend, tiles=tiles, deterministic=deterministic)

    return _part_of(attend, part)


def lightning_call(backend: str, tiles: Any, part: str = "gradients") -> Callable[..., Any]:
    """(q, k, v, do) -> the output ("forward") or the gradients, without decay."""

    def attend(q, k, v):
        return lightning_attention(q, k, v, _no_decay(q), backend=backend, tiles=tiles)

    return _part_of(attend, part)


def state_call(tiles: lightning.GpuTiles) -> Callable[..., Any]:
    """(q, k, v, do) -> the final state."""
    return jax.jit(
        lambda _, k, v, __: lightning_gpu.final_state(k, v, _no_decay(k), None, None, tiles=tiles)
    )


def _no_decay(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape[2], jnp.float32)


def _part_of(attend: Callable[..., Any], part: str) -> Callable[..., Any]:
    if part == "forward":
        return jax.jit(lambda q, k, v, _: attend(q, k, v))
    return jax.jit(lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do))


def forward_tiles(width: int) -> list[dict[str, Any]]:
    """Fields of `flash.GpuTiles` for the forward kernel that fit shared memory and registers.

    A thread holds width / 2 registers of o, kv / 2 of scores and kv / 4 of p.
    """
    sizes = itertools.product(((128, 240), (192, 160)), (64, 128, 256), (2, 3))
    return [
        {"forward": flash.KernelTiles(q=q, kv=kv, stages=stages)}
        for (q, registers), kv, stages in sizes
        if 2 * width * (q + 2 * kv * stages) <= SMEM_BYTES and width // 2 + 3 * kv // 4 < registers
    ]


def backward_tiles(width: int) -> list[dict[str, Any]]:
    """The same for the kernel of dk and dv."""
    if width > 128:  # larger tiles do not fit
        return [{"keys": flash.KernelTiles(q=64, kv=64)}]
    sizes = itertools.product((64, 128), (2, 3))
    return [{"keys": flash.KernelTiles(q=q, kv=128, stages=stages)} for q, stages in sizes]


def row_tiles(width: int) -> list[dict[str, Any]]:
    """The same for the kernel of dq alone."""
    sizes = itertools.product((64, 128), (64, 128), (1, 2))
    return [
        {"rows": flash.KernelTiles(q=q, kv=kv, early_stages=early)}
        for q, kv, early in sizes
        if 2 * width * (2 * q + kv * (2 + early)) <= SMEM_BYTES
    ]
