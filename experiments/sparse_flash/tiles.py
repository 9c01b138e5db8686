"""Tiles of scores that sparse attention computes: intervals against the released bounds.

Claim (2306.01160, released kernels): a tile of queries computes only those tiles of keys that some
of its queries may see. For hash buckets the released rule computes more: it stops at the last tile
that holds any early key, and that tile reaches into the next bucket, whose first keys are early.
Command: longctx reproduce experiments/sparse_flash/tiles.py --scale paper
Expected: tiles of intervals are those with a pair, no fewer are possible; 1.6 to 1.85 times fewer
than released for hashing, and the same for dropping. No hardware is needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention.intervals import Plan, plan_drop, plan_hash, visited_tiles
from longctx.reproduce import Row

TILE, HEADS = 128, 8
LENGTHS = {"smoke": (512,), "small": (8192,), "paper": (8192, 16384, 32768)}
BUCKETS, DROPPED = (8, 16, 32), (0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of 128 x 128 scores that a head visits, on average over heads."""

    def measure(self, scale: str, runs: Path) -> list[Row]:
        """Count them for uniform random buckets and random keep masks."""
        del runs  # nothing is trained
        return [
            row
            for length in LENGTHS[scale]
            for row in (
                *(_hashed(length, buckets) for buckets in BUCKETS),
                *(_dropped(length, share) for share in DROPPED),
            )
        ]

    def table(self, rows: Sequence[Row]) -> str:
        """A row per length and operator."""
        lines = [
            f"# Tiles of {TILE} x {TILE} scores a head visits (times fewer than dense)",
            "",
            "| length | operator | dense causal | released bounds | intervals |",
            "|---|---|---|---|---|",
        ]
        for r in rows:
            counts = (f"{r[n]:.0f} ({r['dense'] / r[n]:.1f}x)" for n in ("released", "intervals"))
            lines.append(
                f"| {r['length']} | {r['operator']} | {r['dense']:.0f} | {' | '.join(counts)} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Dense tiles over visited ones, by length: ours solid, released dotted."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="sequence length", ylabel="times fewer tiles than dense")
        for name in dict.fromkeys(r["operator"] for r in rows):
            shown = [r for r in rows if r["operator"] == name]
            lengths = [r["length"] for r in shown]
            fewer = {n: [r["dense"] / r[n] for r in shown] for n in ("intervals", "released")}
            (line,) = axes.plot(lengths, fewer["intervals"], "o-", label=name)
            axes.plot(lengths, fewer["released"], "x:", color=line.get_color())
        axes.plot([], [], "kx:", label="released bounds")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _hashed(length: int, buckets: int) -> Row:
    hashes = jax.random.randint(jax.random.key(buckets), (1, length, HEADS), 0, buckets)
    plan_of = functools.partial(plan_hash, k_hashes=None, num_buckets=buckets)

    def released(rows: np.ndarray) -> int:
        order = np.argsort(rows, kind="stable")
        bucket, time = (x.reshape(-1, TILE) for x in (rows[order], order))
        tiles = 0
        for low, high, last in zip(bucket.min(1), bucket.max(1), time.max(1), strict=True):
            start, stop = np.sum(bucket.max(1) < low), np.sum(bucket.min(1) <= high)
            early = np.flatnonzero(time.min(1)[start:stop] <= last)
            tiles += early[-1] + 1 if early.size else stop - start
        return tiles

    return _row(f"hash nb={buckets}", length, jax.jit(plan_of)(hashes), released, hashes)


def _dropped(length: int, share: float) -> Row:
    keys = jax.random.split(jax.random.key(0))
    keep = [jax.random.uniform(key, (1, length, HEADS)) >= share for key in keys]
    capacity = min(length, int((1 - share) * length) + 256)
    plan_of = functools.partial(plan_drop, capacity_q=capacity, capacity_k=capacity)

    def released(keep_q: np.ndarray, keep_k: np.ndarray) -> int:
        last, first = (
            np.array([pick(t[i : i + TILE]) for i in range(0, t.size, TILE)])
            for t, pick in ((np.flatnonzero(keep_q), np.max), (np.flatnonzero(keep_k), np.min))
        )
        return int(np.sum(first[None] <= last[:, None]))

    return _row(f"drop {share}", length, jax.jit(plan_of)(*keep), released, *keep)


def _row(operator: str, length: int, plan: Plan, released: Callable[..., int], *rows: Any) -> Row:
    """One row; `released` counts the tiles of one head from its rows of `rows`, each [1, T, H]."""
    heads = (np.asarray(x[0]).T for x in rows)
    tiles = length // TILE
    return {
        "operator": operator,
        "length": length,
        "heads": HEADS,
        "dense": tiles * (tiles + 1) // 2,
        "released": float(np.mean([released(*head) for head in zip(*heads, strict=True)])),
        "intervals": float(jnp.mean(visited_tiles(plan, TILE))),
    }


EXPERIMENT = Tiles()
