"""What `longctx reproduce` asks of an experiment file, and what it leaves behind."""

import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from longctx.provenance import read_rows, write_rows

type Row = Mapping[str, Any]


@runtime_checkable
class Experiment(Protocol):
    """One table or figure of a paper."""

    def measure(self, scale: str, runs: Path) -> Iterable[Row]:
        """Measure it at a scale ("smoke", "small" or "paper"); `runs` keeps finished training.

        Rows are written down as they come.
        """
        ...

    def table(self, rows: Sequence[Row]) -> str:
        """The rows as a Markdown table, the paper's number beside ours."""
        ...

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """The rows as a PNG."""
        ...


def load(file: Path) -> Experiment:
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
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment {file} must define EXPERIMENT, with measure, table and draw")
    return experiment


def reproduce(file: Path, scale: str, out: Path) -> Path:
    """Measure the experiment in `file`; write results.jsonl, table.md and figure.png.

    Returns:
      The folder of the three files, `out/<paper>/<experiment>/<scale>`.
    """
    experiment = load(file)
    folder = out / file.resolve().parent.name / file.stem / scale
    write_rows(folder / "results.jsonl", experiment.measure(scale, out / "runs"))
    rows = read_rows(folder / "results.jsonl")
    (folder / "table.md").write_text(experiment.table(rows))
    experiment.draw(rows, folder / "figure.png")
    return folder
