"""Tiles measured on a device by `longctx tune-device`; the families' own tables stand behind them.

`tuned_tiles.json`, beside this file, maps device kind -> family -> what the tiles are for ->
their fields. There is none until somebody tunes. It is read once in a process.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels._dispatch import target

PATH = Path(__file__).with_name("tuned_tiles.json")


@functools.cache
def _table(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def tuned_tiles[Tiles](family: str, key: str, make: Callable[..., Tiles]) -> Tiles | None:
    """The tiles tuned for the device being compiled for, made of their fields, or None."""
    kind = target().device_kind
    fields = _table(PATH).get(kind, {}).get(family, {}).get(key)
    if fields is None:
        return None
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        rule = "must be as this version writes it: run `longctx tune-device` again, or delete it"
        raise ValueError(f"{PATH}: {kind}, {family}, {key} = {fields} {rule} ({error})") from error


def write_tuned(path: Path, device_kind: str, tables: dict[str, dict[str, Any]]) -> None:
    """Put `tables`, by family, in the place of what `path` has for this kind of device."""
    before = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps({**before, device_kind: tables}, indent=2, sort_keys=True)
    path.write_text(text + "\n")
    _table.cache_clear()
