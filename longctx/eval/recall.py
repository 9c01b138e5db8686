"""Accuracy of a trained run on the synthetic tasks: JSONL, a table and a figure."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longctx.errors import UserError, told_as
from longctx.figures import length_axis, tidy
from longctx.models import ModelConfig
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.provenance import read_rows, write_rows
from longctx.tasks import TASKS, Episode, Needle, Task, TextCodec, episodes, named_task, score
from longctx.train.restore import load_run

type Row = dict[str, Any]

# Depths of the needle's grid, and tokens per call of the model.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH_TOKENS = 16384
# Answers differ in length from episode to episode; whole multiples of this are compiled once.
ANSWER_TOKENS = 64


class Answerer:
    """What a model answers, all answers of a batch in one forward pass.

    The tokens of an answer are predicted with the right earlier ones given, which scores an
    answer as right exactly when greedy decoding would give it.
    """

    def __init__(self, graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, mesh: Mesh):
        self._variables, self._sharding = (params, rest), NamedSharding(mesh, P())

        @jax.jit
        def answer(
            variables: tuple[nnx.State, nnx.State],
            tokens: Int[Array, "B T"],
            places: Int[Array, "B A"],
        ) -> Int[Array, "B A"]:
            model = nnx.merge(graph, *variables)
            rows = jnp.arange(tokens.shape[0])[:, None]
            hidden = model(tokens)[rows, places - 1]
            return jnp.argmax(model.logits(hidden), axis=-1)

        self._answer = answer

    def __call__(self, batch: Sequence[Episode]) -> list[np.ndarray]:
        """Per episode its tokens, with what the model predicts in place of the answers."""
        longest = max(int(e.answer.sum()) for e in batch)
        places = np.ones((len(batch), longest + -longest % ANSWER_TOKENS), np.int32)
        for row, episode in zip(places, batch, strict=True):
            row[: episode.answer.sum()] = np.flatnonzero(episode.answer)
        tokens = np.stack([episode.tokens for episode in batch])
        placed = [jax.device_put(x, self._sharding) for x in (tokens, places)]
        given = np.asarray(self._answer(self._variables, *placed))
        out = []
        for episode, row in zip(batch, given, strict=True):
            predicted = episode.tokens.copy()
            predicted[episode.answer] = row[: episode.answer.sum()]
            out.append(predicted)
        return out


def score_task(answerer: Answerer, task: Task, length: int, count: int, *, seed: int = 0) -> float:
    """Mean score on the first `count` test episodes of a task."""
    size = max(1, min(count, BATCH_TOKENS // length))
    sample = list(itertools.islice(episodes(task, length=length, seed=seed), count))
    total = 0.0
    for first in range(0, count, size):
        batch = sample[first : first + size]
        filled = batch + batch[:1] * (size - len(batch))  # one shape, compiled once
        total += sum(map(score, batch, answerer(filled)[: len(batch)]))
    return total / count


def evaluate_tasks(
    run: pathlib.Path,
    names: Sequence[str],
    lengths: Sequence[int],
    *,
    count: int = 64,
    mesh: MeshConfig | None = None,
) -> list[Row]:
    """Score the newest checkpoint of `run` on tasks at lengths; the needle at every depth.

    Text tasks are written in the run's tokens. Writes `tasks.jsonl`, row by row, and `tasks.png`
    into the run.

    Returns:
      A row per task, length and (for the needle) depth: the share of right answers in `count`
      test episodes, and what guessing would give.

    Raises:
      UserError: a task is unknown or has tokens that the model lacks, a length is too short for a
        task or too long for the model, or there are too few devices for `mesh`.
      RunError: `run` has no checkpoint that can be read.
    """
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise UserError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(TASKS)}")
    with told_as(UserError):
        device_mesh = make_mesh(mesh)
    with jax.set_mesh(device_mesh):
        loaded = load_run(run, device_mesh)
        codec = TextCodec.named(loaded.config.data.tokenizer)
        grid = [
            cell
            for name in names
            for length in sorted(lengths)
            for cell in _cells(name, named_task(name, codec), length)
        ]
        for cell in grid:
            _check(cell, loaded.config.model)
        answerer = Answerer(loaded.graph, loaded.params, loaded.rest, device_mesh)
        model = {"step": loaded.step, "train_length": loaded.config.data.sequence_length}
        rows = (row | model for row in _scores(answerer, grid, count))
        write_rows(run / "tasks.jsonl", rows)
    draw_tasks(run)
    records = read_rows(run / "tasks.jsonl")
    _show(records)
    return records


class Cell(NamedTuple):
    """One number to measure."""

    name: str
    task: Task
    length: int
    depth: float | None


def _cells(name: str, task: Task, length: int) -> list[Cell]:
    """The needle at every depth of the grid; other tasks as they are."""
    if isinstance(task, Needle) and task.keys == task.values == 1:
        at = {depth: dataclasses.replace(task, depth=depth) for depth in DEPTHS}
        return [Cell(name, needle, length, depth) for depth, needle in at.items()]
    return [Cell(name, task, length, None)]


def _check(cell: Cell, model: ModelConfig) -> None:
    """Raise UserError if the cell cannot be measured."""
    if cell.task.vocab_size > model.vocab_size:
        raise UserError(
            f"task {cell.name} needs model.vocab_size={model.vocab_size} to be at least "
            f"{cell.task.vocab_size}"
        )
    model.check_length(cell.length)
    with told_as(UserError, where=f"task {cell.name}"):
        next(episodes(cell.task, length=cell.length))


def _scores(answerer: Answerer, grid: Sequence[Cell], count: int) -> Iterator[Row]:
    for cell in track(grid, "tasks", console=Console(stderr=True)):
        yield {
            "task": cell.name,
            "length": cell.length,
            "depth": cell.depth,
            "episodes": count,
            "accuracy": score_task(answerer, cell.task, cell.length, count),
            "chance": cell.task.chance,
        }


def _means(scores: Sequence[Row], task: str) -> dict[int, float]:
    """Accuracy by length, over depths."""
    by_length: dict[int, list[float]] = {}
    for record in scores:
        if record["task"] == task:
            by_length.setdefault(record["length"], []).append(record["accuracy"])
    return {length: float(np.mean(values)) for length, values in by_length.items()}


def _show(records: Sequence[Row]) -> None:
    lengths = sorted({r["length"] for r in records})
    table = Table(title="accuracy by length (the needle: mean over depths)")
    for column in ("task", "chance", *map(str, lengths)):
        table.add_column(column, justify="right")
    for task, chance in {r["task"]: r["chance"] for r in records}.items():
        means = _means(records, task)
        table.add_row(task, f"{chance:.2g}", *(f"{means[n]:.3f}" for n in lengths))
    Console().print(table)


def draw_tasks(run: pathlib.Path) -> pathlib.Path:
    """Draw `run/tasks.png` from `run/tasks.jsonl`: accuracy by length, and the needle's map."""
    from matplotlib.figure import Figure  # slow to import

    records = read_rows(run / "tasks.jsonl")
    grid = [r for r in records if r["depth"] is not None]
    figure = Figure(figsize=(10 if grid else 6, 4), layout="constrained")
    panels = figure.subplots(1, 2 if grid else 1, squeeze=False)[0]
    for task in dict.fromkeys(r["task"] for r in records):
        means = _means(records, task)
        panels[0].plot(list(means), list(means.values()), marker="o", label=task)
    trained = records[0]["train_length"]
    panels[0].axvline(trained, color="grey", linestyle=":", label=f"trained at {trained:,}")
    panels[0].set(ylabel="accuracy", ylim=(-0.02, 1.02), title=run.name)
    length_axis(panels[0], sorted({r["length"] for r in records}), "sequence length")
    tidy(panels[0])
    panels[0].legend(frameon=False)
    if grid:
        image = draw_needle(panels[1], grid)
        panels[1].set_title("needle in a haystack")
        figure.colorbar(image, ax=panels[1], label="accuracy")
    path = run / "tasks.png"
    figure.savefig(path, dpi=150)
    return path


def draw_needle(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """The needle's accuracy by depth and length; blank where there are no such rows."""
    lengths = sorted({r["length"] for r in records})
    cells = np.full((len(DEPTHS), len(lengths)), np.nan)
    for r in records:
        if r["depth"] is not None:
            cells[DEPTHS.index(r["depth"]), lengths.index(r["length"])] = r["accuracy"]
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
    axes.set(xlabel="sequence length", ylabel="depth of the needle")
    return image
