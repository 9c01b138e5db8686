"""Language models with tensorized attention, and how they extrapolate beyond the trained length.

Claim (2410.20926, abstract): models trained at 32768 tokens keep a steady perplexity to 131072.
Its tables could not be read, so no other number of the paper stands beside ours.
Command: longctx reproduce experiments/tensorized/language_model.py --scale small
Expected: dominance worst of the causal arms, by what block starts lose; mixed radix with the
self-edge bias near dense; beyond the trained length dense RoPE degrades and digit positions do
not. Whether the slow hop beats the window alone is the open question; text may have too few
dependencies beyond the window to tell, for which see long_range.py. The small scale has 10M
parameters, 2048 tokens in 32 blocks, 13M tokens of Python, a byte each, and two seeds of the dense
arm alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.tensorized.base import (
    ARMS,
    PAPER,
    arms_table,
    by_length,
    by_place,
    draw_buckets,
    llama,
)
from longctx.data.config import DataConfig
from longctx.models import MODELS
from longctx.models.config import TensorizedConfig
from longctx.reproduce import Ablation, Part, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

BEYOND = (1, 2, 4, 8)  # multiples of the trained length

# The shape the paper names, Llama-8B (numbers of Llama 3), at its trained length.
LARGE = RunConfig(
    model=dataclasses.replace(
        MODELS["llama-3-8b"],
        softmax=dataclasses.replace(MODELS["llama-3-8b"].softmax, window=512),
        tensorized=TensorizedConfig(dims=(512, None)),
        remat="block",
    ),
    data=DataConfig(sequence_length=PAPER.trained_length, batch_size=32),
    optim=OptimConfig(learning_rate=2e-5),
    train=TrainConfig(steps=1000, checkpoint_every=100),
    eval=EvalConfig(every=100, tokens=1 << 20),
)
SMALL = RunConfig(
    model=llama(384, 6, 6, 64),
    data=DataConfig(sequence_length=2048, batch_size=16),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=40),
    train=TrainConfig(steps=400, log_every=50, checkpoint_every=10_000),
    eval=EvalConfig(tokens=1 << 19),
)
TINY = RunConfig(
    model=llama(32, 2, 2, 8, dtype="float32"),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=512),
)


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """The arms of an ablation, each scored at and beyond its trained length, and by block."""

    ablation: Ablation

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each arm."""
        return self.ablation.runs(scale)

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """A part per arm and seed."""
        return [part.then(self._rows) for part in self.ablation.parts(scale, runs)]

    def _rows(self, row: Row, config: RunConfig, run: Path) -> Iterator[Row]:
        """Scores at each length, and by place in a block of n_1 tokens."""
        trained, tokens = config.data.sequence_length, config.eval.tokens
        block = self.ablation.scales[row["scale"]].model.softmax.window
        row = {**row, "places": by_place(run, block, tokens=tokens)}
        lengths = [m * trained for m in BEYOND]
        yield from by_length(row, run, lengths, trained=trained, tokens=tokens)

    def table(self, rows: Sequence[Row]) -> str:
        """Bits per byte by length, then at the first place of a block and at the others."""
        trained = rows[0]["trained"]
        lines = [
            f"# {self.ablation.title} ({self.ablation.source})",
            "",
            f"Held-out bits per byte; trained at {trained} tokens "
            f"({rows[0]['scale']} scale, {rows[0]['device']}). The paper: steady from "
            f"{PAPER.trained_length}, where it trained, to {PAPER.steady_to} tokens.",
            "",
            *arms_table(rows, "length", "bits_per_byte"),
            "",
            f"At {trained} tokens, by place in a block of n_1 tokens, but the first block:",
            "",
            "| arm | seed | first token of a block | all others |",
            "|---|---|---|---|",
        ]
        for r in (r for r in rows if r["length"] == trained):
            first, *others = r["places"]
            count = sum(b["tokens"] for b in others)
            mean = sum(b["tokens"] * b["bits_per_byte"] for b in others) / count
            lines.append(
                f"| {r['arm']} | {r['seed']} | {first['bits_per_byte']:.4f} | {mean:.4f} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Loss by tokens of context at the largest length, and by place in a block."""
        from matplotlib.figure import Figure  # slow to import

        longest, trained = max(r["length"] for r in rows), rows[0]["trained"]
        figure = Figure(figsize=(13, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_buckets(left, [r for r in rows if r["length"] == longest], "buckets")
        left.axvline(trained, color="grey", linestyle=":")
        left.set(xlabel="tokens of context (dotted: trained length)", ylabel="bits per byte")
        draw_buckets(right, [r for r in rows if r["length"] == trained], "places")
        right.set(xlabel="place in a block of n_1 tokens (leftmost: the first)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


EXPERIMENT = Extrapolation(
    Ablation(
        "Tensorized attention and extrapolation",
        "arXiv 2410.20926",
        paper_unit="(tables could not be read)",
        base="dense",
        arms=ARMS,
        scales={"paper": LARGE, "small": SMALL, "smoke": TINY},
        seeds={"smoke": 1, "small": 2, "paper": 1},
    )
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
