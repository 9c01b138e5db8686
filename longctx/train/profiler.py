"""A profiler trace of some steps."""

import pathlib

import jax


class Profiler:
    """Writes a trace of steps `first` to `last` under `out/profile` (open it with xprof)."""

    def __init__(self, out: pathlib.Path, first: int, last: int) -> None:
        self._directory, self._first, self._last = out / "profile", first, last
        self._running = False

    def before(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, results: object) -> None:
        """Call with what the step returned."""
        if step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced, also if the run ends before the last step asked for."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
