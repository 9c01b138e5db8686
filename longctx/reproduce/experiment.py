"""What `longctx reproduce` asks of an experiment file, and what it leaves behind."""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from longctx.provenance import read_rows, write_rows
from longctx.reproduce.part import Part, Row, rows_of


class Experiment(Protocol):
    """One table or figure of a paper."""

    def table(self, rows: Sequence[Row]) -> str:
        """The rows as a Markdown table, the paper's number beside ours."""
        ...

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """The rows as a PNG."""
        ...


@runtime_checkable
class Whole(Experiment, Protocol):
    """An experiment that is measured in one go."""

    def measure(self, scale: str, runs: Path) -> Iterable[Row]:
        """Measure it at a scale ("smoke", "small" or "paper"); rows are written down as they come.

        Nothing else uses the device meanwhile. In `runs` are the runs of other experiments.
        """
        ...


@runtime_checkable
class Divided(Experiment, Protocol):
    """An experiment on trained runs."""

    def parts(self, scale: str, runs: Path) -> Sequence[Part]:
        """Its parts at a scale, in the order of the table; trained runs are in `runs`."""
        ...


def load(file: Path) -> Whole | Divided:
    """The `EXPERIMENT` of an experiment file.

    The folder that holds `experiments/` is put on the import path, so that such a file may
    import its neighbours.

    Raises:
      ValueError: there is no such file, or it has no EXPERIMENT of the right kind.
    """
    if not file.is_file():
        raise ValueError(f"experiment {file} is not a file")
    file = file.resolve()
    for folder in file.parents:
        if folder.name == "experiments" and str(folder.parent) not in sys.path:
            sys.path.insert(0, str(folder.parent))
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}.{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Whole | Divided):
        raise ValueError(
            f"experiment {file} must define EXPERIMENT, with table, draw, and parts or measure"
        )
    return experiment


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment file at a scale, and where its results go."""

    file: Path
    scale: str
    out: Path

    @functools.cached_property
    def experiment(self) -> Whole | Divided:
        """What the file defines."""
        return load(self.file)

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        """Of a divided experiment."""
        experiment = self.experiment
        return experiment.parts(self.scale, self.runs) if isinstance(experiment, Divided) else ()

    @property
    def runs(self) -> Path:
        """Where trained runs are, those of all experiments."""
        return self.out / "runs"

    @property
    def name(self) -> str:
        """Paper, experiment and scale."""
        return f"{self.file.resolve().parent.name}.{self.file.stem}.{self.scale}"

    @property
    def folder(self) -> Path:
        """Of results.jsonl, table.md and figure.png."""
        return self.out.joinpath(*self.name.split("."))

    @property
    def results(self) -> Path:
        """All rows."""
        return self.folder / "results.jsonl"

    def collect(self) -> None:
        """Write down the rows of the parts that are measured."""
        rows = [row for part in self.parts for row in rows_of(part, self.name, self.runs)]
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.results.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        os.replace(unfinished, self.results)

    def measure(self) -> None:
        """Measure an experiment that is not divided."""
        assert isinstance(self.experiment, Whole)
        write_rows(self.results, self.experiment.measure(self.scale, self.runs))

    def show(self) -> None:
        """Write table.md and figure.png, and print the table."""
        rows = read_rows(self.results)
        table = self.experiment.table(rows)
        (self.folder / "table.md").write_text(table)
        self.experiment.draw(rows, self.folder / "figure.png")
        print(f"{table}\n{self.folder}: results.jsonl, table.md, figure.png\n", flush=True)
