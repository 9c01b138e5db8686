"""`longctx reproduce`: run experiment files and write down what came out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from longctx.cli import parse
from longctx.errors import UserError, told_as
from longctx.reproduce.many import reproduce as measure


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Run experiments of the papers; write results.jsonl, table.md and figure.png of each."""

    # Experiment files, for instance experiments/transnormer/gating.py.
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    # Every experiment below the folder experiments/, instead of `files`.
    all: bool = False
    # smoke (seconds), small (one accelerator) or paper (as printed).
    scale: Literal["smoke", "small", "paper"] = "smoke"
    # Where results go; what its folder runs/ holds of an earlier call is used again.
    out: Path = Path("runs/reproduce")
    # Training runs at once, each in a process of its own, all on the same device. Their compiling,
    # reading and saving overlaps then; speeds are measured afterwards, one at a time.
    jobs: int = 1
    # NVIDIA GPUs that the jobs are dealt out over, one each in turn.
    gpus: int = 1

    def __post_init__(self) -> None:
        if bool(self.files) == self.all:
            raise ValueError("give experiment files or --all, and not both")
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1")
        if not 1 <= self.gpus <= self.jobs:
            raise ValueError(f"gpus={self.gpus} must be from 1 to jobs={self.jobs}")


def reproduce(arguments: Sequence[str]) -> None:
    """`longctx reproduce FILE... [--scale SCALE] [--out DIR] [--jobs N] [--gpus N]`."""
    options = parse(ReproduceOptions, "reproduce", arguments)
    files = sorted(experiment_files(Path("experiments"))) if options.all else options.files
    if not files:
        raise UserError(f"--all: {Path('experiments').absolute()} has no experiments")
    with told_as(UserError):
        measure(files, options.scale, options.out, options.jobs, options.gpus)


def experiment_files(root: Path) -> list[Path]:
    """The files below `root` that define an EXPERIMENT."""
    return [file for file in root.glob("*/*.py") if "\nEXPERIMENT" in file.read_text()]
