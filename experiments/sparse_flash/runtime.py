"""Runtime of sparse attention over length, buckets and dropped share.

Claim (2306.01160, notebook of the release, A100, against PyTorch 2.0's flash attention, B = 4,
H = 48, D = 64): at 32768 tokens hash-sparse is 0.93, 1.45, 2.1, 2.7, 3.2, 3.4 times as fast as
dense for 2 ... 64 buckets, dropping 1.04, 1.34, 2.5, 6.2, 12 times at 20, 30, 50, 70, 80%.
Command: longctx reproduce experiments/sparse_flash/runtime.py --scale paper
Expected: time falls with buckets and dropped share; overhead dominates below some 4K tokens. Like
the notebook, forward + backward with ordering and moves, random buckets given, inclusive diagonal;
the batch halves where dense attention would not fit.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench._timing import time_ms
from experiments.bench.sparse import both
from longctx.attention.sparse import (
    hash_sparse_attention,
    plan_drop,
    plan_hash,
    qk_sparse_attention,
    visited_tiles,
)
from longctx.reproduce import Row
from pallas_kernels.flash_attention import flash_attention

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

    def measure(self, scale: str, runs: Path) -> list[Row]:
        """Time every operator; ratios are to dense attention by our own kernel."""
        del runs  # nothing is trained
        grid, rows = GRIDS[scale], []
        for length in grid.lengths:
            batch = max(1, min(grid.batch, TOKENS // length))
            keys = jax.random.split(jax.random.key(0), 5)
            shape = (batch, length, grid.heads, grid.width)
            arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]]
            dense = None
            for name, operator, rest, tiles in _operators(grid, shape[:3], keys[4]):
                ms = time_ms(both(operator), *arrays, *rest, batches=3)
                dense = dense or ms
                row = {"operator": name, "length": length, "batch": batch, "heads": grid.heads}
                row |= {"ms": ms, "speedup": dense / ms, "tiles": tiles}
                rows.append(row | {"paper_ms": PAPER.get((name, length))})
        return rows

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
            known, ratio = r["paper_ms"], ""
            if known is not None:
                ratio = f"{PAPER['dense', r['length']] / known:.2f}"
            lines.append(
                f"| {r['length']} | {r['batch']} | {r['operator']} | {r['ms']:.2f} | "
                f"{r['speedup']:.2f} | {r['tiles']:.0f} | {known or ''} | {ratio} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Speedup over dense by length, a line per operator."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="sequence length", ylabel="times as fast as dense")
        for name in dict.fromkeys(r["operator"] for r in rows):
            ours = [(r["length"], r["speedup"]) for r in rows if r["operator"] == name]
            axes.plot(*zip(*ours, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _operators(
    grid: Grid, rows: tuple[int, int, int], key: Array
) -> Iterator[tuple[str, Callable[..., Array], list[Any], float]]:
    """Name, operator, further arguments, tiles of 128 x 128 that one head visits."""
    length = rows[1]
    tiles = -(-length // 128)

    def dense(q: Array, k: Array, v: Array) -> Array:
        return cast(Array, flash_attention(q, k, v))

    yield "dense", dense, [], tiles * (tiles + 1) / 2
    for n in grid.buckets:
        hashes = jax.random.randint(key, rows, 0, n)

        def hashed(q: Array, k: Array, v: Array, hashes: Array, n: int = n) -> Array:
            return hash_sparse_attention(q, k, v, num_buckets=n, hashes=hashes, strict=False)

        plan_of = functools.partial(plan_hash, k_hashes=None, num_buckets=n, strict=False)
        plan = jax.jit(plan_of)(hashes)
        yield f"hash nb={n}", hashed, [hashes], float(visited_tiles(plan).mean())
    for share in grid.dropped:
        keep = [jax.random.uniform(k, rows) >= share for k in jax.random.split(key)]
        capacity = min(length, int((1 - share) * length) + 256)
        sizes = {"capacity_q": capacity, "capacity_k": capacity}
        plan = jax.jit(functools.partial(plan_drop, **sizes))(*keep)
        drop = functools.partial(qk_sparse_attention, **sizes)
        yield f"drop {share}", drop, keep, float(visited_tiles(plan).mean())


EXPERIMENT = Runtime()
