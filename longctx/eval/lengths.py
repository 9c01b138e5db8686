"""Bits per byte of a trained run at several lengths, one JSONL and one figure."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longctx.data.pipeline import load_corpus
from longctx.errors import UserError, told_as
from longctx.eval.score import Score, make_scorer
from longctx.figures import length_axis, tidy
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.provenance import read_rows, write_rows
from longctx.train.restore import load_run


def evaluate(
    run: pathlib.Path,
    lengths: Sequence[int],
    *,
    tokens: int = 2**16,
    mesh: MeshConfig | None = None,
) -> list[Score]:
    """Score the newest checkpoint of `run` on its held-out text, at each length.

    All lengths see the same text, cut differently; they may exceed the training length. Writes
    `eval.jsonl` (a line per length) and `eval.png` into the run.

    Args:
      run: directory of the run.
      lengths: tokens per sequence; each must divide the largest.
      tokens: held-out tokens scored, at least one block of the largest length.
      mesh: devices to use; default one.

    Raises:
      RunError: `run` has no checkpoint that can be read.
      UserError: there are too few devices for `mesh`, or the model cannot take a length.
      DataError: the held-out text is shorter than the largest length.
      ValueError: a length does not divide the largest.
    """
    with told_as(UserError):
        device_mesh = make_mesh(mesh)
    with jax.set_mesh(device_mesh):
        loaded = load_run(run, device_mesh)
        config = loaded.config
        config.model.check_length(max(lengths))
        corpus = load_corpus(config.data, "valid", vocab_size=config.model.vocab_size)
        scores = []
        for length in track(sorted(lengths), "lengths", console=Console(stderr=True)):
            scorer = make_scorer(
                loaded.graph, corpus, length, tokens=tokens, mesh=device_mesh, block=max(lengths)
            )
            scores.append(scorer(loaded.params, loaded.rest))
    origin = {"step": loaded.step, "train_length": config.data.sequence_length}
    write_rows(run / "eval.jsonl", (origin | dataclasses.asdict(score) for score in scores))
    plot_scores(run)
    _show(scores)
    return scores


def _show(scores: Sequence[Score]) -> None:
    """A table: a row per length, a column per bucket of context."""
    longest = max(scores, key=lambda score: score.length)
    table = Table()
    for name in ("length", "tokens", "all", *(f"{b.first}+" for b in longest.buckets)):
        table.add_column(name, justify="right")
    for score in scores:
        by_context = [
            "" if b.bits_per_byte is None else f"{b.bits_per_byte:.3f}" for b in score.buckets
        ]
        table.add_row(
            str(score.length), str(score.tokens), f"{score.bits_per_byte:.3f}", *by_context
        )
    console = Console()
    console.print("held-out bits per byte; columns on the right by tokens of context")
    console.print(table)


def plot_scores(run: pathlib.Path) -> pathlib.Path:
    """Draw `run/eval.png` from `run/eval.jsonl`: the score by length, and by context."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    viridis = colormaps["viridis"]
    records = read_rows(run / "eval.jsonl")
    lengths, trained = [r["length"] for r in records], records[0]["train_length"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(run.name)
    by_length, by_context = figure.subplots(1, 2, sharey=True)
    by_length.plot(lengths, [r["bits_per_byte"] for r in records], "o-", color="black")
    by_length.axvline(trained, color="grey", linestyle=":", label=f"trained at {trained:,}")
    by_length.set_ylabel("held-out bits per byte")
    length_axis(by_length, lengths, "sequence length")
    for place, record in enumerate(records, start=1):
        shown = [b for b in record["buckets"] if b["tokens"]]
        ends = [b["last"] + 1 for b in shown]
        values = [b["bits_per_byte"] for b in shown]
        colour = viridis(1 - place / len(records))
        by_context.plot(ends, values, "o-", color=colour, label=f"length {record['length']:,}")
    ends = [b["last"] + 1 for b in records[-1]["buckets"]]
    length_axis(by_context, ends, "tokens of context, up to")
    for axes in (by_length, by_context):
        tidy(axes)
        axes.legend(frameon=False)
    path = run / "eval.png"
    figure.savefig(path, dpi=150)
    return path
