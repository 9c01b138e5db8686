"""Several processes of one run on this machine, each with two CPU devices."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[3]

# The `longctx` of this interpreter comes first.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(
    command: Sequence[str], *, also_on_path: str = "", **environment: str
) -> subprocess.Popen:
    """`command`, with all that it prints kept; programs in `also_on_path` come first."""
    path = os.pathsep.join(filter(None, [also_on_path, ENVIRONMENT["PATH"]]))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | environment | {"PATH": path},
    )


def start_pair(*arguments: str, hit: int = 1, by: str = "SIGKILL", step: int = 0) -> list:
    """Two processes of one `longctx train`; `hit` gets a signal before `step` (0: never)."""
    port, pair = free_port(), []
    for number in range(2):
        launch = {"coordinator": f"localhost:{port}", "processes": 2, "process": number}
        joined = [str(word) for n, value in launch.items() for word in (f"--launch.{n}", value)]
        own_step = str(step if number == hit else 0)
        program = [sys.executable, "-m", "tests.longctx.train.killed", by, own_step, "train"]
        pair.append(start([*program, *arguments, *joined]))
    return pair


def finish(process: subprocess.Popen, within: float = 300) -> tuple[int, str]:
    """Exit code and output; the process is killed if it takes longer than `within` seconds."""
    try:
        said, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said
