"""Timing jitted functions."""

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# What the code of others raises where it will not run.
REFUSALS = (
    AssertionError,
    AttributeError,
    ExceptionGroup,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def time_ms(
    function: Callable[..., Any],
    *args: Any,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    batch_ms: float = 40.0,
    batches: int = 7,
    seconds: float = 0.0,
) -> float:
    """Milliseconds of one warm `function(*args)`: the median over batches of queued calls.

    The calls of a batch are queued without waiting and the clock is read once they are all done,
    so that dispatch hides behind the device as long as a call takes the device longer (some
    20 us). `wait` blocks on a result; for another framework pass its own. CPUs queue nothing:
    collectives of queued calls may wait for each other's threads. Nor are calls queued that are
    a batch by themselves: their results may fill the memory. With `seconds` it is the least of
    the batches of so long a time: on a shared CPU other programs come and go, and only add.
    """
    batch = timed_batch(function, *args, wait=wait, batch_ms=batch_ms)
    found, end = [batch()], time.perf_counter() + seconds
    while len(found) < batches or time.perf_counter() < end:
        found.append(batch())
    return min(found) if seconds else statistics.median(found)


def timed_batch(
    function: Callable[..., Any],
    *args: Any,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    batch_ms: float,
) -> Callable[[], float]:
    """Runs a batch of warm calls and returns the milliseconds of one; see `time_ms`."""
    queue = jax.default_backend() != "cpu"
    for _ in range(2):  # compile, then settle the allocator
        wait(function(*args))

    def batch(calls: int) -> float:
        start, out = time.perf_counter(), None
        for _ in range(calls):
            out = function(*args)
            if not queue:
                wait(out)
        wait(out)
        return (time.perf_counter() - start) * 1e3 / calls

    alone = batch(1)
    calls = max(1, int(batch_ms / (alone if alone > batch_ms / 2 else batch(3))))
    return functools.partial(batch, calls)


def in_turn[Name](
    prepare: Mapping[Name, Callable[[], Callable[[], float]]],
    count: int,
    refusals: tuple[type[BaseException], ...] = (),
) -> dict[Name, list[float] | BaseException]:
    """Times of programs that are compared, `count` batches of each, or why one refused.

    `prepare` makes what runs a batch, as `timed_batch` does, or raises one of `refusals`. Batches
    take turns, every time in another order: at their power limit GPUs slow down, by more than a
    tenth, for a part of a second after a change of load, and in a fixed order that part would
    always be the same program's.
    """
    found: dict[Name, list[float] | BaseException] = {}
    ready: list[tuple[list[float], Callable[[], float]]] = []
    for name, make in prepare.items():
        try:
            times: list[float] = []
            ready.append((times, make()))
            found[name] = times
        except refusals as reason:
            found[name] = reason.with_traceback(None)  # whose frames keep arrays alive
    shuffled = random.Random(0)
    for _ in range(count):
        for times, batch in shuffled.sample(ready, len(ready)):
            times.append(batch())
    return found
