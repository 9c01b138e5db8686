r"""Lightning attention against its peers and against the byte floor of the device.

    python -m experiments.bench.lightning [--groups shapes lengths heads ...] [--out results/...]

Groups: `shapes`, the four that targets are set for; `heads`, the same number of tokens per call
with 256 to 16 heads in all; `lengths`, 1, 2 and 4 rows of 16 heads from 16K to 1M tokens;
`full`, 8 rows from 4K to 128K; `worst`, few heads and no decay. Decays are ALiBi's slopes.

The longest of `lengths` fill the memory: measure them in a process of their own. What the device
has no room for, by the compiler's count, is named and left out.

Off a GPU there is only `lengths`, smaller. There glibc returns results above 32 MB to the operating
system, which clears the next ones page by page: a fifth of a forward pass. To time the operator
and not that, let glibc keep its memory:

    GLIBC_TUNABLES=glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:\
glibc.malloc.trim_threshold=17179869184 python -m experiments.bench.lightning

Peers, where installed: flash-linear-attention's chunk_simple_gla and its fused variants. One that
is absent is named in the output. `scan` is the textbook's chunked loop in plain JAX, `xla` our own.
Times are medians of warm, queued calls in one process; the floor is what reading the inputs and
writing the outputs once costs at the rate of a copy measured in the same run. Errors are relative
RMS errors against float64. Writes JSONL and, with `lengths`, a plot of the time per token beside
it; prints the rows, and what they must show.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._claims import claims_table
from experiments.bench._lightning_peers import (
    EXACT,
    FORWARD,
    IMPLEMENTATIONS,
    INPUTS,
    OPERATORS,
    Shape,
    float64,
    lowerings,
    of_fla,
    on,
)
from experiments.bench._lightning_report import claims, plot, table
from experiments.bench._timing import REFUSALS, time_ms
from longctx.device.programs import compile_all, does_not_fit
from longctx.provenance import read_rows, write_rows

RESULTS = Path(__file__).parent / "results"
NAMES = ("o", "dq", "dk", "dv")
BESIDE_PEERS = ("shapes", "worst")  # groups, with errors


def groups_for(platform: str) -> dict[str, list[Shape]]:
    """Shapes of each group; what a CPU can run in a minute elsewhere."""
    if platform != "gpu":
        small = functools.partial(Shape, 1, heads=2, dtype=jnp.float32)
        return {"lengths": [small(1024 * n) for n in (1, 4, 16, 64)]}
    lengths = [16384 * n for n in (64, 32, 16, 4, 1)]
    return {
        "shapes": [Shape(16, 2048), Shape(4, 8192), Shape(1, 32768), Shape(1, 131072)],
        "heads": [Shape(32768 // n, n) for n in (2048, 4096, 8192, 16384, 32768)],
        "worst": [Shape(1, 32768, decays=False)],
        # The largest first: in the memory that it has taken all others find room.
        "lengths": [Shape(rows, n) for n in lengths for rows in (4, 2, 1)],
        "full": [Shape(8, 4096 * n) for n in (1, 4, 16, 32)],
    }


def fitted(program: Any) -> Any:
    """A compiled program, or its refusal if the device has less memory than it needs."""
    if isinstance(program, BaseException):
        return program
    reason = does_not_fit(program)
    return program if reason is None else RuntimeError(reason)


def errors(results: Sequence[Any], wanted: Sequence[jax.Array]) -> dict[str, float]:
    """Relative RMS error of each result."""

    @jax.jit
    def error(got, want):
        return jnp.linalg.norm((got.astype(want.dtype) - want).ravel()) / jnp.linalg.norm(
            want.ravel()
        )

    with jax.enable_x64(True):
        arrays = [x if isinstance(x, jax.Array) else jnp.from_dlpack(x.detach()) for x in results]
        return {n: float(error(*pair)) for n, *pair in zip(NAMES, arrays, wanted, strict=True)}


def copy_rate(platform: str) -> float:
    """Bytes per second, read and written, of the negation of a large array."""
    x = jax.random.normal(jax.random.key(0), (2**28 if platform == "gpu" else 2**24,))
    negate = jax.jit(jnp.negative)
    return 2 * x.nbytes / time_ms(negate, x) * 1e3


def compiled_names(group: str) -> Sequence[str]:
    """What JAX runs of a group: beside the peers everything, else ours."""
    return (*OPERATORS, EXACT) if group in BESIDE_PEERS else ("ours",)


def measure(
    group: str, shape: Shape, programs: Mapping[str, Sequence[Any]], seconds: float
) -> Iterator[dict]:
    """One row for each implementation. `seconds`: see `time_ms`."""
    fits = any(not isinstance(both, BaseException) for _, both in programs.values())
    inputs = shape.inputs(INPUTS if fits else FORWARD)
    about = shape._asdict() | {"dtype": jnp.dtype(shape.dtype).name, "group": group}
    wanted = float64(programs[EXACT], inputs) if EXACT in programs else None
    tokens = shape.batch * shape.length
    for name in IMPLEMENTATIONS if group in BESIDE_PEERS else programs:
        row: dict[str, Any] = {**about, "implementation": name}
        try:
            calls = on(programs[name], inputs) if name in programs else of_fla(name, inputs)
            for what, call in (("forward", calls.forward), ("both", calls.both)):
                row[f"{what}_ms"] = time_ms(call, wait=calls.wait, seconds=seconds)
                row[f"{what}_ns_per_token"] = row[f"{what}_ms"] * 1e6 / tokens
            if wanted is not None:
                row["errors"] = errors(calls.both(), wanted)
        except REFUSALS as reason:
            row["absent"] = f"{type(reason).__name__}: {str(reason)[:200]}"
            reason.__traceback__ = None  # a refused program would keep the arrays alive with it
        yield row


def add_floors(rows: list[dict], rate: float) -> None:
    """Each row's floors, 4 arrays forward and 11 with the backward, and the share reached."""
    for row in rows:
        shape = Shape(**{name: row[name] for name in Shape._fields})
        for name, tensors in (("forward", 4), ("both", 11)):
            floor = shape.megabytes(tensors) * 1e9 / rate
            row[f"{name}_floor_ms"] = floor
            if f"{name}_ms" in row:
                row[f"{name}_of_floor"] = floor / row[f"{name}_ms"]
        row["copy_bytes_per_second"] = rate


def main() -> None:
    """Measure the groups asked for."""
    # JAX leaves memory to torch, and takes nearly all of it if need be.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    platform = jax.default_backend()
    groups = groups_for(platform)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--out", type=Path, default=RESULTS / f"lightning_{platform}.jsonl")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="least time in so long, not median"
    )
    parser.add_argument("--plot", type=Path, help="only plot and print these rows")
    options = parser.parse_args()
    if options.plot:
        rows = read_rows(options.plot)
        print(table(rows), claims_table(claims(rows)), sep="\n\n")
        return plot(rows, options.plot)

    rows: list[dict] = []
    rate = 0.0
    plan = [(group, shape) for group in options.groups for shape in groups[group]]
    cases = [(*where, name) for where in plan for name in compiled_names(where[0])]
    every = (lower for _, shape, name in cases for lower in lowerings(name, shape))
    compiled = [fitted(program) for program in compile_all(every, REFUSALS)]
    pairs = dict(zip(cases, zip(compiled[::2], compiled[1::2], strict=True), strict=True))
    for group, shape in plan:
        programs = {name: pairs[group, shape, name] for name in compiled_names(group)}
        for row in measure(group, shape, programs, options.seconds):
            print(row, flush=True)
            rows.append(row)
        rate = max(rate, copy_rate(platform))
        add_floors(rows, rate)
        write_rows(options.out, rows)
    print(table(rows))
    if platform == "gpu":
        print(claims_table(claims(rows)))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is absent; for the plot: --plot {options.out}")
    else:
        plot(rows, options.out)


if __name__ == "__main__":
    main()
