"""Same-bucket causal pairs that are computed: all of them, against Reformer's fixed chunks.

Claim (2306.01160, text): exact hash attention sees every pair of one bucket, Reformer's sorted
chunks of fixed size (own and previous one) a share that falls with the length.
Command: longctx reproduce experiments/sparse_flash/coverage.py --scale paper
Expected: ours 1 everywhere; chunks of 64 with 16 uniform buckets about 1.00, 0.90, 0.60, 0.34, 0.18
from 1024 to 16384 tokens. Chunks as long as the mean bucket keep up while buckets are even, and
lose where they are not (bucket i as likely as 1 / (i + 1)). The mask of the operator's own plan is
counted; no hardware.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention.intervals import Plan, plan_hash
from longctx.reproduce import Row

BUCKETS, CHUNK, HEADS = 16, 64, 4
LENGTHS = {"smoke": (256,), "small": (1024, 2048, 4096), "paper": (1024, 2048, 4096, 8192, 16384)}
LIKELIHOODS = {"even": np.ones(BUCKETS), "uneven": 1 / np.arange(1, BUCKETS + 1)}
METHODS = {
    "hash": "hash-sparse",
    "chunks": f"chunks of {CHUNK} and the one before",
    "mean_chunks": "chunks of length / buckets and the one before",
}
EXPECTED = {1024: 1.00, 2048: 0.90, 4096: 0.60, 8192: 0.34, 16384: 0.18}  # derived, not printed


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Share of the same-bucket causal pairs that each method computes."""

    def measure(self, scale: str, runs: Path) -> list[Row]:
        """Count pairs for random buckets, even and uneven."""
        del runs  # nothing is trained
        return [_shares(length, buckets) for buckets in LIKELIHOODS for length in LENGTHS[scale]]

    def table(self, rows: Sequence[Row]) -> str:
        """A row per length and kind of buckets."""
        lines = [
            f"# Coverage of same-bucket causal pairs, {BUCKETS} buckets",
            "",
            f"| buckets | length | {' | '.join(METHODS.values())} | expected, chunks of {CHUNK} |",
            "|---|---|---|---|---|---|",
        ]
        for r in rows:
            shares = " | ".join(f"{r[name]:.3f}" for name in METHODS)
            expected = f"{EXPECTED[r['length']]:.2f}" if _is_expected(r) else ""
            lines.append(f"| {r['buckets']} | {r['length']} | {shares} | {expected} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Shares over length, a panel per kind of buckets."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, len(LIKELIHOODS), sharey=True)
        for axes, buckets in zip(panels, LIKELIHOODS, strict=True):
            shown = [r for r in rows if r["buckets"] == buckets]
            for name, label in METHODS.items():
                axes.plot([r["length"] for r in shown], [r[name] for r in shown], "o-", label=label)
            axes.set(xlabel="sequence length", title=f"{BUCKETS} {buckets} buckets", ylim=(0, 1.05))
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("share of same-bucket pairs computed")
        panels[0].legend(fontsize="small", loc="lower left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


_plan = jax.jit(functools.partial(plan_hash, k_hashes=None, num_buckets=BUCKETS))


def _is_expected(row: Row) -> bool:
    return row["buckets"] == "even" and row["length"] in EXPECTED


def _shares(length: int, buckets: str) -> Row:
    logits = jnp.log(jnp.asarray(LIKELIHOODS[buckets]))
    hashes = jax.random.categorical(jax.random.key(length), logits, shape=(1, length, HEADS))
    plan = _plan(hashes)
    wanted = sum(
        int(n) * (int(n) - 1) // 2
        for head in np.asarray(hashes[0]).T
        for n in np.bincount(head, minlength=BUCKETS)
    )
    counts = {
        "hash": int(jnp.sum(plan.hi - plan.lo)),
        "chunks": _chunked(plan, CHUNK),
        "mean_chunks": _chunked(plan, length // BUCKETS),
    }
    shares = {name: count / wanted for name, count in counts.items()}
    return {"length": length, "buckets": buckets, "pairs": wanted, **shares}


def _chunked(plan: Plan, chunk: int) -> int:
    """Pairs of the plan whose key lies in the chunk of the ordered query or in the one before."""
    row = np.arange(plan.lo.shape[-1])
    first = np.maximum(np.asarray(plan.lo), (row // chunk - 1) * chunk)
    return int(np.maximum(np.asarray(plan.hi) - first, 0).sum())


EXPERIMENT = Coverage()
