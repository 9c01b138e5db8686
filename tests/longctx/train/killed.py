"""Runs a tiny run and kills its own process, as `kill -9` does, before a given step.

python -m tests.longctx.train.killed SOURCE OUT STEP
"""

import os
import pathlib
import signal
import sys

import tests.conftest  # noqa: F401  the same devices as in the tests
from longctx.train import loop
from tests.longctx.train.runs import tiny_run


def main(source: str, out: str, step: str) -> None:
    put_batch, calls = loop.put_batch, 0

    def put_or_die(*args):
        nonlocal calls
        calls += 1
        if calls == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return put_batch(*args)

    loop.put_batch = put_or_die
    loop.train(tiny_run(source), pathlib.Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
