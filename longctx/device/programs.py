"""Compiling many programs, before the first of them is timed, and what they need."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


def compile_all(
    lowerings: Iterable[Callable[[], jax.stages.Lowered]],
    refusals: tuple[type[BaseException], ...] = (),
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Every program compiled, or that of the `refusals` which it raised, in the order given.

    `options` are XLA's.
    Lowering is Python, of which one thread runs at a time: the programs are lowered one after
    another, and compile side by side as soon as they are.
    """

    def result(start: "Future[jax.stages.Compiled] | BaseException") -> Any:
        try:
            return start.result() if isinstance(start, Future) else start
        except refusals as refusal:
            return refusal

    with ThreadPoolExecutor() as pool:
        started: list[Future[jax.stages.Compiled] | BaseException] = []
        for lower in lowerings:
            try:
                started.append(pool.submit(lower().compile, compiler_options=options))
            except refusals as refusal:
                started.append(refusal)
        return [result(start) for start in started]


def bytes_needed(program: jax.stages.Compiled) -> int:
    """Memory for its arguments, results and what lives between, by the compiler."""
    memory = program.memory_analysis()
    assert memory is not None, "every backend that we have reports it"
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes  # results that lie where donated arguments lay


def does_not_fit(program: jax.stages.Compiled) -> str | None:
    """What is wrong if the device has less memory than the program needs."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None or bytes_needed(program) <= limit:
        return None
    return f"needs {bytes_needed(program) / 1e9:.1f} GB of {limit / 1e9:.1f} GB of memory"
