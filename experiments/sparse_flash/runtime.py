"""Runtime of sparse attention over length, buckets and dropped share.

Claim (2306.01160, notebook of the release, A100, against PyTorch 2.0's flash attention, B = 4,
H = 48, D = 64): at 32768 tokens hash-sparse is 0.93, 1.45, 2.1, 2.7, 3.2, 3.4 times as fast as
dense for 2 ... 64 buckets, dropping 1.04, 1.34, 2.5, 6.2, 12 times at 20, 30, 50, 70, 80%.
Command: longctx reproduce experiments/sparse_flash/runtime.py --scale paper
Expected: time falls with buckets and dropped share; overhead dominates below some 4K tokens. Like
the notebook, forward + backward with ordering and moves, random buckets given, inclusive diagonal;
the batch halves where dense attention would not fit. Ratios are to the faster of cuDNN and our own
dense kernel.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from experiments.bench._passes import with_gradients
from experiments.bench._timing import time_ms
from experiments.bench.sparse import Arm, dense_arms, drop_arm, hash_arm, inputs
from longctx.device.programs import compile_all
from longctx.reproduce import Row

# Milliseconds of the authors' notebook, read off its figures to about 4 ms.
PAPER = {
    ("dense", 8192): 67, ("dense", 16384): 257, ("dense", 32768): 1004,
    ("hash nb=2", 8192): 82, ("hash nb=2", 16384): 292, ("hash nb=2", 32768): 1076,
    ("hash nb=4", 8192): 57, ("hash nb=4", 16384): 195, ("hash nb=4", 32768): 693,
    ("hash nb=8", 16384): 143, ("hash nb=8", 32768): 481,
    ("hash nb=16", 16384): 116, ("hash nb=16", 32768): 373,
    ("hash nb=32", 16384): 103, ("hash nb=32", 32768): 317,
    ("hash nb=64", 16384): 97, ("hash nb=64", 32768): 292,
    ("drop 0.2", 8192): 75, ("drop 0.2", 16384): 262, ("drop 0.2", 32768): 967,
    ("drop 0.3", 8192): 60, ("drop 0.3", 16384): 206, ("drop 0.3", 32768): 751,
    ("drop 0.4", 8192): 48, ("drop 0.4", 16384): 159, ("drop 0.4", 32768): 561,
    ("drop 0.5", 8192): 36, ("drop 0.5", 16384): 115, ("drop 0.5", 32768): 402,
    ("drop 0.6", 8192): 26, ("drop 0.6", 16384): 79, ("drop 0.6", 32768): 267,
    ("drop 0.7", 16384): 51, ("drop 0.7", 32768): 163,
    ("drop 0.8", 16384): 29, ("drop 0.8", 32768): 84,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is timed at one scale."""

    lengths: tuple[int, ...]
    buckets: tuple[int, ...]
    dropped: tuple[float, ...]
    batch: int = 4
    heads: int = 48
    width: int = 64


GRIDS = {
    "smoke": Grid((128,), (2,), (0.5,), batch=1, heads=2, width=16),
    "small": Grid((2048, 8192, 32768), (4, 16), (0.3, 0.5), batch=1, heads=16),
    "paper": Grid(
        (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
        (2, 4, 8, 16, 32, 64),
        (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    ),
}
TOKENS = 131072  # batch x length at most


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Milliseconds and tiles, by operator and length."""

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Time every operator, length by length: those of one are compiled side by side."""
        del runs  # nothing is trained
        grid = GRIDS[scale]
        for length in track(grid.lengths, "lengths", console=Console(stderr=True)):
            batch = max(1, min(grid.batch, TOKENS // length))
            arms = _arms(grid, (batch, length, grid.heads))
            arrays = inputs(batch, length, grid.heads, grid.width)
            programs = compile_all(
                functools.partial(jax.jit(with_gradients(arm.function)).lower, *arrays, *arm.rest)
                for arm in arms
            )
            times = [
                time_ms(program, *arrays, *arm.rest, batches=3)
                for program, arm in zip(programs, arms, strict=True)
            ]
            dense = min(ms for ms, arm in zip(times, arms, strict=True) if "dense" in arm.name)
            for arm, ms in zip(arms, times, strict=True):
                yield {
                    "operator": arm.name,
                    "length": length,
                    "batch": batch,
                    "heads": grid.heads,
                    "ms": ms,
                    "speedup": dense / ms,
                    "tiles": arm.tiles,
                    "overflow": arm.overflow,
                    "paper_ms": PAPER.get((arm.name.removeprefix("our "), length)),
                }

    def table(self, rows: Sequence[Row]) -> str:
        """A row per operator and length."""
        lines = [
            f"# Runtime of sparse attention on {rows[0]['device']}, forward + backward",
            "",
            "| length | batch | operator | ms | dense / this | tiles a head | paper, ms (A100) | "
            "paper, dense / this |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            known, ratio = r["paper_ms"], _paper_speedup(r)
            lines.append(
                f"| {r['length']} | {r['batch']} | {r['operator']} | {r['ms']:.2f} | "
                f"{r['speedup']:.2f} | {r['tiles']:.0f} | {known or ''} | "
                f"{'' if ratio is None else f'{ratio:.2f}'} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Time per sequence above, speed over dense below, beside the paper's; hash left."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(11, 8), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, kind in zip(panels.T, ("hash", "drop"), strict=True):
            shown = [r for r in rows if "dense" in r["operator"] or kind in r["operator"]]
            for name in dict.fromkeys(r["operator"] for r in shown):
                _draw_operator(column, [r for r in shown if r["operator"] == name])
            column[1].plot([], [], "kx:", label="paper, A100")
            column[1].legend(fontsize="small", ncols=2)
            column[1].set_xlabel("sequence length")
            for axes in column:
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.grid(alpha=0.3)
        panels[0, 0].set_ylabel("ms per sequence, forward + backward")
        panels[1, 0].set_ylabel("times as fast as dense")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _arms(grid: Grid, rows: tuple[int, int, int]) -> list[Arm]:
    """The operators of the grid for rows [B, T, H]."""
    key = jax.random.key(1)
    return [
        *dense_arms(rows[1]),
        *(hash_arm(n, jax.random.randint(key, rows, 0, n), strict=False) for n in grid.buckets),
        *(drop_arm(share, rows, key) for share in grid.dropped),
    ]


def _paper_speedup(row: Row) -> float | None:
    known = row["paper_ms"]
    return None if known is None else PAPER["dense", row["length"]] / known


def _draw_operator(column: Sequence[Any], rows: Sequence[Row]) -> None:
    """The lines of one operator: time in the upper panel, speed in the lower one."""
    time, speed = column
    lengths = [r["length"] for r in rows]
    (line,) = time.plot(lengths, [r["ms"] / r["batch"] for r in rows], "o-")
    label, colour = rows[0]["operator"], line.get_color()
    speed.plot(lengths, [r["speedup"] for r in rows], "o-", color=colour, label=label)
    paper = [(r["length"], _paper_speedup(r)) for r in rows if r["paper_ms"] is not None]
    if paper and "dense" not in label:
        speed.plot(*zip(*paper, strict=True), "x:", color=colour)


EXPERIMENT = Runtime()
