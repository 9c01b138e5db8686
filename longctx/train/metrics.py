"""Where the numbers of a run go: metrics.jsonl always, other trackers on request."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

from longctx.errors import RunError
from longctx.train.config import Tracker

type Record = dict[str, float | int | None]  # `step` and numbers by name


class Sink(Protocol):
    """Receives the records of a run; each has a `step`."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class JsonLines:
    """One JSON object per line, flushed at once so that a killed run keeps what it measured."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Append a line; non-finite numbers become null."""
        finite = {k: _json_number(v) for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files under `tensorboard/` (extra `tensorboard`)."""

    def __init__(self, out: pathlib.Path) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(out / "tensorboard"))

    def write(self, record: Record) -> None:
        """Add every number as a scalar."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, int(record["step"] or 0))

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run named after the run directory (extra `wandb`)."""

    def __init__(self, out: pathlib.Path) -> None:
        import wandb  # pyrefly: ignore[missing-import]

        self._run = wandb.init(project="longctx", name=out.name, dir=out)

    def write(self, record: Record) -> None:
        """Log the record at its step."""
        self._run.log(
            {k: v for k, v in record.items() if k != "step"}, step=int(record["step"] or 0)
        )

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def open_sinks(out: pathlib.Path, trackers: Sequence[Tracker]) -> list[Sink]:
    """metrics.jsonl and the trackers asked for.

    Raises:
      RunError: the package of a tracker is not installed.
    """
    sinks: list[Sink] = [JsonLines(out / "metrics.jsonl")]
    for name in trackers:
        try:
            sinks.append(TRACKERS[name](out))
        except ModuleNotFoundError as error:
            raise RunError(
                f"train.trackers: {name} needs the extra: pip install longctx[{name}]"
            ) from error
    return sinks


def read_metrics(path: pathlib.Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def held_out_curve(records: Sequence[Record]) -> list[tuple[int, float]]:
    """Held-out bits per byte over a run: (steps, score)."""
    scores = [(r["step"], r.get("valid_bits_per_byte")) for r in records]
    return [(int(step or 0), score) for step, score in scores if score is not None]


def forget_after(path: pathlib.Path, step: int) -> None:
    """Drop the records after `step`: a resumed run measures those steps again."""
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if int(r["step"] or 0) <= step]
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(rewritten, path)


def _json_number(value: float | None) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
