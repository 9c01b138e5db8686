"""`longctx reproduce`: run experiment files and write down what came out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from longctx.cli import parse
from longctx.errors import UserError
from longctx.reproduce.experiment import reproduce as measure


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Run experiments of the papers; write results.jsonl, table.md and figure.png of each."""

    # Experiment files, for instance experiments/transnormer/gating.py.
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    # Every experiment below the folder experiments/, instead of `files`.
    all: bool = False
    # smoke (seconds), small (one accelerator) or paper (as printed).
    scale: Literal["smoke", "small", "paper"] = "smoke"
    # Where results go; finished training runs in its folder runs/ are used again.
    out: Path = Path("runs/reproduce")

    def __post_init__(self) -> None:
        if bool(self.files) == self.all:
            raise ValueError("give experiment files or --all, and not both")


def reproduce(arguments: Sequence[str]) -> None:
    """`longctx reproduce FILE... [--scale SCALE] [--out DIR]`."""
    options = parse(ReproduceOptions, "reproduce", arguments)
    files = sorted(experiment_files(Path("experiments"))) if options.all else options.files
    for file in files:
        try:
            folder = measure(file, options.scale, options.out)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        print((folder / "table.md").read_text())
        print(f"{folder}: results.jsonl, table.md, figure.png\n")


def experiment_files(root: Path) -> list[Path]:
    """The files below `root` that define an EXPERIMENT."""
    return [file for file in root.glob("*/*.py") if "\nEXPERIMENT" in file.read_text()]
