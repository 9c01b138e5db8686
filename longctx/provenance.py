"""Rows of results that say where they come from: command, commit, date, device, versions."""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

VERSIONS_OF = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "torch",
    "triton",
    "tokamax",
    "flash-linear-attention",
    "fla-core",
    "nvidia-cudnn-cu13",
)

# Variables that decide what a command does or how long it takes, and so belong to it: recorded
# here, never obeyed.
SETTINGS = (
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "LIBTPU_INIT_ARGS",
    "GLIBC_TUNABLES",
)


def device_info() -> dict[str, Any]:
    """The device, its driver, and the versions of what runs on it."""
    device = jax.devices()[0]
    driver = None
    if device.platform == "gpu" and shutil.which("nvidia-smi"):
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "driver": driver.split("\n")[0] if driver else None,
        "versions": versions,
    }


def origin() -> dict[str, Any]:
    """Command, commit (None outside a checkout), date and `device_info()` of this process."""
    settings = [
        f"{name}={shlex.quote(os.environ[name])}" for name in SETTINGS if name in os.environ
    ]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return {
        "command": " ".join([*settings, program, *map(shlex.quote, sys.argv[1:])]),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **device_info(),
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as JSONL, each at once and with the `origin` of this process."""
    source = origin()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        for row in rows:
            f.write(json.dumps({**row, **source}) + "\n")
            f.flush()  # what was measured stays if the rest is killed


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache  # once a process, before it rewrites committed rows: no change of the code
def _output(*command: str) -> str | None:
    """What `command` prints, or None if it fails or is not there."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
