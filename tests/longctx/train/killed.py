"""The longctx command, which sends its own process a signal before a given training step.

python -m tests.longctx.train.killed SIGKILL STEP train ...
"""

import os
import signal
import sys

from longctx import cli
from longctx.train import loop


def main(name: str, step: str, *arguments: str) -> None:
    put_batch, calls = loop.put_batch, 0

    def put_after_signal(*args):
        nonlocal calls
        calls += 1
        if calls == int(step):
            os.kill(os.getpid(), getattr(signal, name))
        return put_batch(*args)

    loop.put_batch = put_after_signal
    cli.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
