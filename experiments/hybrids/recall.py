"""Hybrids: recall against training speed, from pure lightning to pure softmax attention.

Claim (2501.08313, section 2 and table of 1B hybrids): pure lightning attention fails needle
retrieval; with softmax attention in every eighth layer it reaches 95.7%, where windows in place of
lightning reach 26% to 54%.
Command: longctx reproduce experiments/hybrids/recall.py --scale small
Expected: MQAR of at least 0.95 at the trained length for hybrids and softmax; windows below; pure
lightning below with 64 pairs, about what its states can hold.

Every model is trained on all the tasks in turn, on bytes, and then scored at its length and beyond.
Short episodes are practised beside those of the whole length: without them softmax attention
guessed among an episode's values for all of 4000 steps at the same rate (one H100, one seed), and
no model learned to recall within 3400 steps without `RESIDUAL`. It weighs down what sublayers add:
the weights' first spread is width^-1/2 instead of 0.02, since in models this narrow recall is
learned much later otherwise, and random sublayers of that spread bury the token's own embedding, by
which keys are matched. RoPE's wavelengths end near the trained length, so that most of its features
tell neighbours apart; with the usual base of 10000 tiny models did not learn to look one token back
in 800 steps.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.data.config import DataConfig
from longctx.data.episodes import shorter
from longctx.eval.recall import draw_needle, evaluate_tasks
from longctx.models import BYTE_VOCAB, ResidualConfig, SoftmaxConfig, count_parameters, tnl
from longctx.reproduce import Part, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

# Mixers of the layers, repeated, and what the paper's 1B model scores on needles: in per cent, with
# softmax attention in every eighth layer; "fails" is its word for pure lightning attention.
ARMS: dict[str, tuple[tuple[str, ...], str]] = {
    "lightning": (("lightning",), "fails"),
    "7 lightning : 1": (("lightning",) * 7 + ("softmax",), "95.7"),
    "3 lightning : 1": (("lightning",) * 3 + ("softmax",), ""),
    "1 lightning : 1": (("lightning", "softmax"), ""),
    "softmax": (("softmax",), ""),
    "window": (("window",), ""),
    "7 window : 1": (("window",) * 7 + ("softmax",), "46.8, 25.7, 53.9"),
}


# Practised in shorter episodes beside what is scored: questions wherever there is room.
PRACTICE = "mqar-often"

# What joins the stream of a sublayer's output (ours): MLPs bury embeddings most, mixers in eight
# layers too.
RESIDUAL = ResidualConfig(lightning=(1.0, 0.5), softmax=(1.0, 0.5), mlp=(1.0, 0.1))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the models, of their training and of the tests."""

    width: int
    head_dim: int
    length: int
    batch: int
    steps: int
    episodes: int
    tasks: tuple[str, ...] = ("mqar", "mqar-64", "needle")
    arms: tuple[str, ...] = tuple(ARMS)
    num_layers: int = 8
    window: int = 64
    learning_rate: float = 1e-3
    beyond: tuple[int, ...] = (1, 2, 4)
    dtype: str = "bfloat16"


SCALES = {
    "smoke": Scale(
        width=32,
        head_dim=16,
        length=64,
        batch=2,
        steps=2,
        episodes=4,
        tasks=("mqar",),
        arms=("lightning", "1 lightning : 1", "softmax"),
        num_layers=2,
        window=16,
        beyond=(1,),
        dtype="float32",
    ),
    "small": Scale(256, 64, 256, 128, 4000, 256),
    "paper": Scale(512, 64, 1024, 128, 20_000, 256),
}


def run(scale: Scale, mixers: tuple[str, ...]) -> RunConfig:
    """The run that trains one model on all tasks."""
    heads = scale.width // scale.head_dim
    model = dataclasses.replace(
        tnl(scale.width, scale.num_layers, 2 * scale.width, head_dim=scale.head_dim),
        vocab_size=BYTE_VOCAB,
        mixers=mixers,
        softmax=SoftmaxConfig(
            heads, heads, scale.head_dim, window=scale.window, rope_base=scale.length / 6
        ),
        residual=RESIDUAL,
        init_std=scale.width**-0.5,
        dtype=scale.dtype,
    )
    return RunConfig(
        model=model,
        data=DataConfig(
            source=f"task:{'+'.join((*shorter(PRACTICE, scale.length), *scale.tasks))}",
            sequence_length=scale.length,
            batch_size=scale.batch,
        ),
        optim=OptimConfig(
            learning_rate=scale.learning_rate, warmup_steps=min(100, scale.steps // 2)
        ),
        train=TrainConfig(
            steps=scale.steps, log_every=min(100, scale.steps), checkpoint_every=scale.steps
        ),
        eval=EvalConfig(tokens=scale.batch * scale.length),
    )


@dataclasses.dataclass(frozen=True)
class Recall:
    """Accuracy on each task, by arm, length and depth, with the speed of training."""

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each arm."""
        sizes = SCALES[scale]
        return {arm: run(sizes, ARMS[arm][0]) for arm in sizes.arms}

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """A part per arm."""
        del runs  # no arm begins with another's parameters
        return [
            Part(arm, config, functools.partial(self._rows, scale, arm, config), timed=True)
            for arm, config in self.runs(scale).items()
        ]

    def _rows(self, scale: str, arm: str, config: RunConfig, folder: Path) -> Iterator[Row]:
        """The trained model's scores on each task and length."""
        sizes = SCALES[scale]
        origin = {
            "arm": arm,
            "paper": ARMS[arm][1],
            "scale": scale,
            "parameters": count_parameters(config.model),
            "tokens": config.tokens_per_step * config.train.steps,
            "trained": sizes.length,
        }
        lengths = [m * sizes.length for m in sizes.beyond]
        scores = evaluate_tasks(folder, sizes.tasks, lengths, count=sizes.episodes)
        shown = ("task", "length", "depth", "episodes", "accuracy", "chance")
        yield from (origin | {name: row[name] for name in shown} for row in scores)

    def table(self, rows: Sequence[Row]) -> str:
        """An arm per row, a task and length per column."""
        columns = list(dict.fromkeys((r["task"], r["length"]) for r in rows))
        heads = [f"{task}, {length}" for task, length in columns]
        lines = [
            f"# Recall of hybrids ({rows[0]['scale']} scale, {rows[0]['device']})",
            "",
            f"Accuracy by task and length; trained at {rows[0]['trained']}, "
            f"{rows[0]['tokens']:,} tokens. The paper's: needles, per cent, of 1B models.",
            "",
            f"| arm | parameters | tokens/s | {' | '.join(heads)} | paper |",
            f"|---|---|---|{'---|' * len(heads)}---|",
        ]
        for arm in dict.fromkeys(r["arm"] for r in rows):
            ours = [r for r in rows if r["arm"] == arm]
            speed = _shown(ours[0]["tokens_per_second"])
            cells = [f"{accuracy(ours, task, length):.3f}" for task, length in columns]
            size = f"{ours[0]['parameters'] / 1e6:.1f}M"
            lines.append(f"| {arm} | {size} | {speed} | {' | '.join(cells)} | {ours[0]['paper']} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Accuracy against speed, where that was measured, and the needle's map of every arm."""
        from matplotlib.figure import Figure  # slow to import

        arms = list(dict.fromkeys(r["arm"] for r in rows))
        timed = any(r["tokens_per_second"] for r in rows)
        figure = Figure(figsize=(2.2 * len(arms) + 2, 7 if timed else 4), layout="constrained")
        grid = figure.add_gridspec(1 + timed, len(arms))
        if timed:
            _draw_speed(figure.add_subplot(grid[0, :]), rows, arms)
        for place, arm in enumerate(arms):
            axes = figure.add_subplot(grid[-1, place], title=arm)
            draw_needle(axes, [r for r in rows if r["arm"] == arm])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def accuracy(rows: Sequence[Row], task: str, length: int) -> float:
    """Mean over depths."""
    return statistics.mean(
        r["accuracy"] for r in rows if (r["task"], r["length"]) == (task, length)
    )


def _shown(speed: float | None) -> str:
    return "" if speed is None else f"{speed:,.0f}"


def _draw_speed(axes: Any, rows: Sequence[Row], arms: Sequence[str]) -> None:
    for task, marker in (("mqar", "o"), ("mqar-64", "s"), ("needle", "D")):
        points = [[r for r in rows if (r["arm"], r["task"]) == (arm, task)] for arm in arms]
        found = [p for p in points if p and p[0]["tokens_per_second"]]
        speeds = [p[0]["tokens_per_second"] for p in found]
        heights = [accuracy(p, task, p[0]["trained"]) for p in found]
        axes.plot(speeds, heights, marker, label=task)
        for p, x, y in zip(found, speeds, heights, strict=True):
            axes.annotate(p[0]["arm"], (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="training, tokens per second", ylabel="accuracy at the trained length")
    axes.set(ylim=(-0.05, 1.1), title=f"Recall of hybrids, {rows[0]['scale']} scale")
    axes.grid(alpha=0.3)
    axes.legend()


EXPERIMENT = Recall()
RUNS, SMOKE = EXPERIMENT.runs("small"), EXPERIMENT.runs("smoke")
