"""Does the slow hop beat a window alone: associative recall and induction beyond the window.

Claim (2410.20926, abstract): hops along the dimensions connect all tokens. No result of the paper
on recall could be read; that mixed radix sees everything by one path is ours, and so is the
question, since the choice inside a far block does not depend on the final query.
Command: longctx reproduce experiments/tensorized/long_range.py --scale small
Expected: the window alone stays near chance on what lies beyond it; dense near 1; mixed radix in
between: exact recall in one layer is not expressible in general, and layers compose.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments.tensorized.base import ARMS, arms_table, llama
from longctx.data.config import DataConfig
from longctx.data.episodes import shorter
from longctx.eval.recall import evaluate_tasks
from longctx.reproduce import SCALES, Ablation, Part, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

TASKS = ("mqar-often", "induction")
EPISODES = {"smoke": 4, "small": 1024, "paper": 4096}  # behind each accuracy


def recall(task: str, scale: str) -> RunConfig:
    """The dense run on a task; the window, a sixteenth of the length, is far too short.

    Episodes of the whole length take turns with shorter ones: without them no arm learned induction
    in as many steps (one H100, one seed). RoPE's wavelengths end near the
    length: recall begins with looking one token back, and tiny models learn that late with the
    usual base of 10000.
    """
    length = {"smoke": 64, "small": 512, "paper": 2048}[scale]
    steps = {"smoke": 2, "small": 2000, "paper": 20_000}[scale]
    model = llama(32, 2, 2, length // 16, dtype="float32")
    if scale != "smoke":
        model = llama(128, 2, 4, length // 16)
    model = dataclasses.replace(
        model, softmax=dataclasses.replace(model.softmax, rope_base=length / 6)
    )
    return RunConfig(
        model=model,
        data=DataConfig(
            source=f"task:{'+'.join((*shorter(task, length), task))}",
            sequence_length=length,
            batch_size=2 if scale == "smoke" else 64,
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=min(steps // 2, 200)),
        train=TrainConfig(steps=steps, log_every=min(steps, 100), checkpoint_every=steps),
        eval=EvalConfig(tokens=64 * length),
    )


def right_answers(task: str, row: Row, config: RunConfig, run: Path) -> Iterator[Row]:
    """`row` with the share of right answers on `task` at the run's length."""
    length = config.data.sequence_length
    (score,) = evaluate_tasks(run, [task], [length], count=EPISODES[row["scale"]])
    yield {**row, **{name: score[name] for name in ("task", "length", "accuracy", "chance")}}


@dataclasses.dataclass(frozen=True)
class Recall:
    """The arms trained on each task, and their share of right answers at the trained length."""

    ablations: Mapping[str, Ablation]

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each task and arm."""
        return {
            f"{task}, {arm}": run
            for task, ablation in self.ablations.items()
            for arm, run in ablation.runs(scale).items()
        }

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """A part per task, arm and seed."""
        return [
            dataclasses.replace(part, name=f"{task}, {part.name}").then(
                functools.partial(right_answers, task)
            )
            for task, ablation in self.ablations.items()
            for part in ablation.parts(scale, runs)
        ]

    def table(self, rows: Sequence[Row]) -> str:
        """Accuracy: a line per arm and seed, a column per task."""
        chance = {r["task"]: f"{r['chance']:.3f}" for r in rows}
        window = rows[0]["length"] // 16
        lines = [
            "# Recall beyond the window (arXiv 2410.20926)",
            "",
            f"Share of right answers at {rows[0]['length']} tokens, of which a window holds "
            f"{window} ({rows[0]['scale']} scale, {rows[0]['device']}).",
            "",
            *arms_table(rows, "task", "accuracy", digits=3),
            f"| (chance) | | {' | '.join(chance.values())} |",
        ]
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """A bar per arm and task, the mean over seeds."""
        from matplotlib.figure import Figure  # slow to import

        tasks = list(dict.fromkeys(r["task"] for r in rows))
        arms = list(dict.fromkeys(r["arm"] for r in rows))
        figure = Figure(figsize=(8, 1 + 0.5 * len(arms)), layout="constrained")
        axes = figure.add_subplot(xlabel="share of right answers", xlim=(0, 1))
        for i, task in enumerate(tasks):
            found: dict[str, list[float]] = {}
            for r in (r for r in rows if r["task"] == task):
                found.setdefault(r["arm"], []).append(r["accuracy"])
            places = [arms.index(arm) + 0.8 * i / len(tasks) for arm in found]
            means = [statistics.mean(accuracies) for accuracies in found.values()]
            axes.barh(places, means, 0.8 / len(tasks), label=task)
        axes.set_yticks([y + 0.4 - 0.4 / len(tasks) for y in range(len(arms))], arms)
        axes.invert_yaxis()
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


EXPERIMENT = Recall(
    {
        task: Ablation(
            f"Recall beyond the window: {task}",
            "arXiv 2410.20926",
            paper_unit="(not in the paper)",
            base="window",
            arms=ARMS,
            scales={scale: recall(task, scale) for scale in SCALES},
            seeds={"smoke": 1, "small": 1, "paper": 3},
            arm_seeds={"paper": 3},
        )
        for task in TASKS
    }
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
