"""Same-bucket causal pairs that are computed: all of them, against Reformer's fixed chunks.

Claim (2306.01160, section 3): exact hash attention sees every pair of one bucket, Reformer's sorted
chunks of fixed size (own and previous one) a share that falls with the length.
Command: longctx reproduce experiments/sparse_flash/coverage.py --scale paper
Expected: ours 1 at every length; chunks of 64 with 16 uniform buckets about 1.00, 0.90, 0.60,
0.34, 0.18 from 1024 to 16384 tokens. The mask of the operator's own plan is counted; no hardware.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention.sparse import plan_hash
from longctx.reproduce import Row

BUCKETS, CHUNK, HEADS = 16, 64, 4
LENGTHS = {"smoke": (256,), "small": (1024, 2048, 4096), "paper": (1024, 2048, 4096, 8192, 16384)}
EXPECTED = {1024: 1.00, 2048: 0.90, 4096: 0.60, 8192: 0.34, 16384: 0.18}  # derived, not printed


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Share of the same-bucket causal pairs that each method computes."""

    def measure(self, scale: str, runs: Path) -> list[Row]:
        """Count pairs for uniform random buckets."""
        del runs  # nothing is trained
        return [_shares(length) for length in LENGTHS[scale]]

    def table(self, rows: Sequence[Row]) -> str:
        """A row per length."""
        lines = [
            f"# Coverage of same-bucket causal pairs, {BUCKETS} uniform buckets",
            "",
            f"| length | hash-sparse | chunks of {CHUNK} and the one before | expected |",
            "|---|---|---|---|",
        ]
        for r in rows:
            expected = EXPECTED.get(r["length"], "")
            lines.append(f"| {r['length']} | {r['hash']:.3f} | {r['chunks']:.3f} | {expected} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Shares over length."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="sequence length", ylabel="share of pairs computed")
        for name in ("hash", "chunks"):
            axes.plot([r["length"] for r in rows], [r[name] for r in rows], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.05)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _shares(length: int) -> Row:
    hashes = jax.random.randint(jax.random.key(length), (1, length, HEADS), 0, BUCKETS)
    plan = jax.jit(functools.partial(plan_hash, k_hashes=None, num_buckets=BUCKETS))(hashes)
    pairs = int(jnp.sum(plan.hi - plan.lo))
    wanted = sum(
        n * (n - 1) // 2
        for head in np.asarray(hashes[0]).T
        for n in np.bincount(head, minlength=BUCKETS)
    )
    # Row r of the sorted order sees, of the same keys, those of its chunk and the one before.
    row = np.arange(plan.lo.shape[-1])
    first = np.maximum(np.asarray(plan.lo), (row // CHUNK - 1) * CHUNK)
    chunked = int(np.maximum(np.asarray(plan.hi) - first, 0).sum())
    return {"length": length, "hash": pairs / wanted, "chunks": chunked / wanted}


EXPERIMENT = Coverage()
