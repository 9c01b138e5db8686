"""Adapting a pretrained Llama-shaped model to longer sequences with tensorized attention.

Claim (2410.20926, abstract): pretrained models adapted by continued training at 32768 tokens keep
a steady perplexity to 131072. Its recipe and its tables could not be read.
Command: longctx reproduce experiments/tensorized/adaptation.py --scale small
Expected: with n_1 = 2048, the pretrained length, nothing changes on the first 2048 tokens before
training; beyond the length adapted at, dense RoPE degrades and digit positions do not. A smaller
n_1 costs something at first. A dense model is trained at 2048 tokens, every arm goes on from it at
4096, and is scored to 16384. The sizes are ours; of a released Llama 3 8B the same is
`longctx adapt FOLDER --model.mixers tensorized --data.sequence-length 32768 ...`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.tensorized.base import PAPER, arms_table, by_length, draw_buckets, llama, mixer
from longctx.data.config import DataConfig
from longctx.reproduce import Ablation, Arm, Part, Row
from longctx.reproduce.part import run_name
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

BEFORE = "before adaptation"

SMALL = RunConfig(
    model=llama(384, 6, 6, 2048),
    data=DataConfig(sequence_length=2048, batch_size=16),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=40),
    train=TrainConfig(steps=800, log_every=50, checkpoint_every=10_000),
    eval=EvalConfig(tokens=1 << 19),
)
LARGE = dataclasses.replace(
    SMALL,
    model=llama(768, 12, 12, 2048),
    data=DataConfig(sequence_length=2048, batch_size=32),
    optim=OptimConfig(learning_rate=6e-4, warmup_steps=200),
    train=dataclasses.replace(SMALL.train, steps=10_000),
    eval=EvalConfig(tokens=1 << 20),
)
TINY = RunConfig(
    model=llama(32, 2, 2, 64, dtype="float32"),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=512),
)
PRETRAINED = {"smoke": TINY, "small": SMALL, "paper": LARGE}


def arms(pretrained: int) -> dict[str, Arm]:
    """Dense, and by n_1, the pretrained length or an eighth of it: window and mixed radix."""
    found = {"dense": Arm()}
    for fast in (pretrained, pretrained // 8):
        for title, name in (("window", "window"), ("mixed radix", "tensorized")):
            found[f"{title} {fast}"] = Arm(change=functools.partial(mixer, name=name, fast=fast))
    return found


def adapted(run: RunConfig, source: str) -> RunConfig:
    """`run` going on from `source` at twice the length: a tenth of the rate, an eighth as long."""
    steps = max(2, run.train.steps // 8)
    data = dataclasses.replace(
        run.data,
        sequence_length=2 * run.data.sequence_length,
        batch_size=max(1, run.data.batch_size // 2),
    )
    return dataclasses.replace(
        run,
        data=data,
        optim=dataclasses.replace(
            run.optim, learning_rate=run.optim.learning_rate / 10, warmup_steps=min(20, steps)
        ),
        train=dataclasses.replace(run.train, steps=steps, init=source),
    )


def reordered(run: RunConfig) -> RunConfig:
    """`run` with its data in the order of its seed: nothing else tells two adapted runs apart."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, seed=run.train.seed))


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Every arm goes on from one dense model, and is scored at and beyond the length adapted at."""

    pretrained: Mapping[str, RunConfig]

    def ablation(self, scale: str, source: str) -> Ablation:
        """The arms that go on from the run in `source`."""
        return Ablation(
            "Adapting a pretrained model",
            "arXiv 2410.20926",
            paper_unit="(tables could not be read)",
            base="dense",
            arms=arms(self.pretrained[scale].data.sequence_length),
            scales={name: adapted(run, source) for name, run in self.pretrained.items()},
            seeds={"smoke": 1, "small": 2, "paper": 1},
            arm_seeds={"small": 2},
        )

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """The pretrained model, then a part per arm and seed; all scored at the same lengths."""
        before = self.pretrained[scale]
        ablation = self.ablation(scale, str(runs / run_name(before)))
        adapted = [
            dataclasses.replace(p, after=before, config=reordered(p.config))
            for p in ablation.parts(scale, runs)
        ]
        pretrained = dataclasses.replace(
            adapted[0],
            name=BEFORE,
            config=before,
            after=None,
            rows=lambda run: [{**row, "arm": BEFORE} for row in adapted[0].rows(run)],
        )
        return [part.then(self._rows) for part in (pretrained, *adapted)]

    def _rows(self, row: Row, config: RunConfig, run: Path) -> Iterator[Row]:
        """Scores at half to four times the length adapted at."""
        length = 2 * self.pretrained[row["scale"]].data.sequence_length
        lengths = [length // 2, length, 2 * length, 4 * length]
        yield from by_length(row, run, lengths, trained=length, tokens=config.eval.tokens)

    def table(self, rows: Sequence[Row]) -> str:
        """Bits per byte by length."""
        lines = [
            "# Adapting a pretrained model (arXiv 2410.20926)",
            "",
            f"Held-out bits per byte; pretrained dense at {rows[0]['trained'] // 2} tokens, "
            f"adapted at {rows[0]['trained']} ({rows[0]['scale']} scale, {rows[0]['device']}). "
            f"The paper: adapted at {PAPER.trained_length}, steady to {PAPER.steady_to}.",
            "",
            *arms_table(rows, "length", "bits_per_byte"),
        ]
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Loss by tokens of context at the largest length."""
        from matplotlib.figure import Figure  # slow to import

        longest = max(r["length"] for r in rows)
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens of context", ylabel="held-out bits per byte")
        draw_buckets(axes, [r for r in rows if r["length"] == longest], "buckets")
        for length in (rows[0]["trained"] // 2, rows[0]["trained"]):
            axes.axvline(length, color="grey", linestyle=":")
        axes.set_title("dotted: lengths of pretraining and of adaptation")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


EXPERIMENT = Adaptation(PRETRAINED)
RUNS = {"pretrained": LARGE, "pretrained-small": SMALL}
SMOKE = {"pretrained": TINY}
