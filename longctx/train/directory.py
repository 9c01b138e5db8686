"""The directory of a run: its `config.json`, its checkpoints, and whether a run may go on in it."""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Iterator
from typing import Any

from longctx.errors import RunError, told_as
from longctx.train.config import RunConfig
from longctx.train.serialize import from_json, to_json

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def check_directory(config: RunConfig, out: pathlib.Path) -> None:
    """Make sure that `out` can be the directory of this run; nothing is written.

    The schedule of a run may be changed when it is resumed, what it is made of may not. Without
    checkpoints there is nothing to resume: a start that failed may be repeated with other values.

    Raises:
      RunError: `out` is a file or no run of this version, holds a run with another model, data,
        optimizer, beginning or seed, or is past the last step.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: choose another --out")
    if not (out / CONFIG_FILE).exists():
        return
    started, saved = read_config(out), newest_step(out)
    if saved is None:
        return
    for name in ("model", "data", "optim", "train.init", "train.seed"):
        value = operator.attrgetter(name)
        changed = list(_changes(value(started), value(config), name))
        if changed:
            raise RunError(
                f"{out} was started with other values ({', '.join(changed)}): "
                "take them back or choose another --out"
            )
    if config.train.steps < saved:
        raise RunError(
            f"train.steps={config.train.steps} must be at least {saved}, the step of the newest "
            f"checkpoint in {out}"
        )


def newest_step(out: pathlib.Path) -> int | None:
    """The step of the newest checkpoint in `out`, readable or not; None without any."""
    names = [path.name for path in (out / CHECKPOINTS).glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    """The fields in which two dataclasses differ, down to the last one."""
    if old == new:
        return
    if not dataclasses.is_dataclass(old) or type(old) is not type(new):
        yield f"{name} {old!r} -> {new!r}"
        return
    for field in dataclasses.fields(old):
        yield from _changes(
            getattr(old, field.name), getattr(new, field.name), f"{name}.{field.name}"
        )


def write_config(config: RunConfig, out: pathlib.Path) -> None:
    """Write config.json, which makes `out` the directory of this run."""
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")


def read_config(out: pathlib.Path) -> RunConfig:
    """The configuration of the run in `out`.

    Raises:
      RunError: `out` is not a run, or not one of this version.
    """
    path = out / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{out} is not a run: it has no {CONFIG_FILE}")
    with told_as(RunError, where=f"{path} cannot be read"):
        return from_json(RunConfig, json.loads(path.read_text()))
