"""Where a number comes from: what every line of results carries."""

import datetime
import pathlib
import subprocess

import jax


def provenance() -> dict[str, str | int | None]:
    """Commit of the source (None outside a checkout), jax version, devices, and the time."""
    source = pathlib.Path(__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "commit": commit,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
