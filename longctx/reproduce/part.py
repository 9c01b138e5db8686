"""Parts of an experiment: runs that are trained and measured in any order, by any process."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longctx.provenance import read_rows, write_rows
from longctx.train.config import RunConfig
from longctx.train.directory import CHECKPOINTS
from longctx.train.loop import train
from longctx.train.metrics import held_out_curve, read_metrics
from longctx.train.serialize import to_json

type Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A run, and the rows that an experiment makes of it.

    Attributes:
      name: of the arm, and whatever else tells it from the others.
      config: the run. It is trained once for all experiments that have it.
      rows: from the folder of the trained run to its rows.
      after: a run that has to be trained before, since `config` begins with its parameters.
      timed: whether the rows say how many tokens a second training steps take in, measured alone.
    """

    name: str
    config: RunConfig
    rows: Callable[[Path], Iterable[Row]]
    after: RunConfig | None = None
    timed: bool = False

    def then(self, rows: Callable[[Row, RunConfig, Path], Iterable[Row]]) -> "Part":
        """The part with other rows: those that `rows` makes of each row, the run, its folder."""

        def made(run: Path) -> Iterator[Row]:
            for row in self.rows(run):
                yield from rows(row, self.config, run)

        return dataclasses.replace(self, rows=made)


def run_name(config: RunConfig) -> str:
    """The name of a run's folder: a checksum of all that it is made of."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:16]


def trained(config: RunConfig, runs: Path) -> Path:
    """The folder in `runs` of a finished run, which is trained if it is not there yet."""
    out = runs / run_name(config)
    with alone(out.with_suffix(".lock")):
        if not (out / CHECKPOINTS / str(config.train.steps)).is_dir():
            train(config, out)
    return out


def held_out(run: Path) -> dict[str, Any]:
    """The name of a finished run and its held-out scores by step: the last one, and all."""
    curve = held_out_curve(read_metrics(run / "metrics.jsonl"))
    return {"run": run.name, "bits_per_byte": curve[-1][-1], "curve": curve}


def measured(part: Part, name: str, runs: Path) -> Path:
    """The file with the rows of a part of experiment `name`, made if it is not there yet.

    Each row says where it was measured, so that it may be put together with others elsewhere.
    """
    if part.after is not None:
        trained(part.after, runs)
    path = rows_file(part, name, runs)
    if not path.exists():
        run, unfinished = trained(part.config, runs), path.with_suffix(".unfinished")
        write_rows(unfinished, part.rows(run))
        os.replace(unfinished, path)
    return path


def rows_file(part: Part, name: str, runs: Path) -> Path:
    """Where the rows of a part of experiment `name` are, once they are measured.

    Parts may share a run: arms that change nothing do.
    """
    which = hashlib.sha256(part.name.encode()).hexdigest()[:8]
    return runs / run_name(part.config) / f"{name}.{which}.jsonl"


def speed_file(part: Part, runs: Path) -> Path:
    """Where the speed of a part's training steps is; it does not depend on the seed."""
    config = part.config
    timed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
    return runs / run_name(timed) / "speed.jsonl"


def rows_of(part: Part, name: str, runs: Path) -> list[dict[str, Any]]:
    """The rows of a part, with the speed of its steps if it is timed; empty if not measured yet."""
    path = rows_file(part, name, runs)
    if not path.exists():
        return []
    rows, speed = read_rows(path), speed_file(part, runs)
    if not part.timed:
        return rows
    found = read_rows(speed)[0]["tokens_per_second"] if speed.exists() else None
    return [row | {"tokens_per_second": found} for row in rows]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Keep out other processes that enter with the same `lock`, until this one leaves."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
