"""A polite end: SIGTERM (and Ctrl-C) let the step finish and the state be saved."""

import os
import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, remembers SIGTERM and SIGINT instead of dying of them.

    With several processes all of them stop after the same step, the one that the
    `jax.distributed` service agrees on. It listens to SIGTERM itself, so that Ctrl-C in one
    process is passed on to it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
            self._former[signal.SIGINT] = signal.signal(signal.SIGINT, self._pass_on)
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.received = number
        os.kill(os.getpid(), signal.SIGTERM)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended."""
        return 128 + (self.received or signal.SIGTERM)

    def after(self, step: int) -> bool:
        """Whether the run should stop after `step`."""
        if jax.process_count() == 1:
            return self.received is not None
        return multihost_utils.reached_preemption_sync_point(step)
