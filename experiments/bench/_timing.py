"""Timing of jitted functions, and rows of results that say where they come from."""

import datetime
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

VERSIONS_OF = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "libtpu",
    "torch",
    "triton",
    "tokamax",
    "flash-linear-attention",
    "nvidia-cudnn-cu13",
)


def time_ms(
    function: Callable[..., Any],
    *args: Any,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    batch_ms: float = 40.0,
    batches: int = 7,
) -> float:
    """Milliseconds of one warm `function(*args)`: the median over batches of queued calls.

    The calls of a batch are queued without waiting and the clock is read once they are all done,
    so that dispatch hides behind the device as long as a call takes the device longer (some
    20 us). `wait` blocks on a result; for another framework pass its own.
    """
    for _ in range(2):  # compile, then settle the allocator
        wait(function(*args))

    def batch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*args)
        wait(out)
        return (time.perf_counter() - start) * 1e3 / calls

    calls = max(1, int(batch_ms / batch(3)))
    return statistics.median(batch(calls) for _ in range(batches))


def device_info() -> dict[str, Any]:
    """The device, its driver, and the versions of what runs on it."""
    device = jax.devices()[0]
    driver = None
    if device.platform == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
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
        "driver": driver,
        "versions": versions,
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, each with the command, the date and `device_info()`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else sys.argv[0]
    origin = {
        "command": " ".join(["python", program, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **device_info(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        f.writelines(json.dumps({**row, **origin}) + "\n" for row in rows)
