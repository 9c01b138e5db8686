"""Flash attention against its peers: dense, grouped, windowed and packed, up to a million tokens.

    python -m experiments.bench.flash [--groups dense gqa ...] [--out results/...]

Groups: `dense`, causal, 16 heads of width 64, 128 and 256; `gqa`, 32 query heads over 8; `window`,
4096 keys at 128K tokens, with the same call without a window; `packed`, 2K documents in one row of
64K tokens, with the same documents as a batch; `long`, a million tokens; `errors`, relative RMS
errors against float64 on short rows. Off a GPU, small ones.

Peers: cuDNN through `jax.nn.dot_product_attention`; tokamax's Mosaic and Triton kernels where it
is installed; jax's own Pallas kernels. One that is absent or refuses is named in the output. Times
are medians of warm, queued calls that take turns in one process, and TFLOP/s count 4 D per seen
pair forward and 2.5 times that backward. Writes JSONL and, of `dense`, a plot beside it; prints the
rows, and what they must show.
"""

import argparse
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from experiments.bench._claims import claims_table
from experiments.bench._flash_peers import IMPLEMENTATIONS, Shape, ours
from experiments.bench._flash_report import claims, plot, table
from experiments.bench._passes import with_gradients
from experiments.bench._timing import REFUSALS, in_turn, timed_batch
from longctx.device.programs import compile_all
from longctx.provenance import read_rows, write_rows

RESULTS = Path(__file__).parent / "results"
NAMES = ("o", "dq", "dk", "dv")
BATCH_MS, TURNS = 40.0, 11  # of queued calls, and how many such batches; 3 of long calls
ALL, RIVALS = tuple(IMPLEMENTATIONS), ("ours", "cudnn", "tokamax")
PEERS = {"dense": ALL, "gqa": ALL, "errors": ALL, "long": ("ours",)}  # elsewhere the rivals


def groups_for(platform: str) -> dict[str, list[Shape]]:
    """Shapes of each group; a row of `packed` is followed by the same documents as a batch."""
    if platform != "gpu":
        small = Shape(1, 512, 2, 2, 64)
        return {
            "dense": [small],
            "window": [small._replace(window=64)],
            "errors": [Shape(1, 128, 2, 1, 64)],
        }
    lengths = [(16, 2048), (4, 8192), (1, 32768)]
    return {
        "dense": [Shape(b, t, width=d) for d in (128, 64) for b, t in lengths]
        + [Shape(b, t, width=256) for b, t in lengths[1:]],
        "gqa": [Shape(4, 8192, 32, 8)],
        "window": [Shape(1, 131072, window=4096), Shape(1, 131072)],
        "packed": [Shape(1, 65536, document=2048), Shape(32, 2048)],
        "long": [Shape(1, 2**20, 1, 1)],
        "errors": [Shape(1, t, 4, 4, width) for width in (64, 128, 256) for t in (1024, 4096)]
        + [Shape(1, 1024, 8, 2), Shape(1, 2048, 4, 4, window=256)],
    }


def errors(found: tuple[jax.Array, ...], shape: Shape) -> dict[str, float]:
    """Relative RMS errors of o, dq, dk and dv against float64 on the same bfloat16 inputs."""
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in shape.inputs()]
        wanted = jax.jit(with_gradients(ours(shape, backend="xla")))(*wide)

        def error(got, want):
            return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())

        pairs = zip(NAMES, found, wanted, strict=True)
        return {n: float(error(got.astype(want.dtype), want)) for n, got, want in pairs}


class Compiled(NamedTuple):
    """Forward, and forward + backward, of one implementation; or why there is none."""

    forward: Callable[..., Any] | None = None
    both: Callable[..., Any] | None = None
    temporary_bytes: int | None = None  # of forward + backward
    absent: str = ""


def lowerings(shape: Shape, name: str) -> list[Callable[[], jax.stages.Lowered]]:
    """Of the forward, and of forward + backward."""
    types = shape.types()

    def forward():
        return jax.jit(IMPLEMENTATIONS[name](shape)).lower(*types[:3])

    def both():
        return jax.jit(with_gradients(IMPLEMENTATIONS[name](shape))).lower(*types)

    return [forward, both]


def compiled(forward: Any, both: Any) -> Compiled:
    """The two programs, or what compiling them raised."""
    for reason in (forward, both):
        if isinstance(reason, BaseException):
            return Compiled(absent=f"{type(reason).__name__}: {str(reason)[:200]}".split("\n")[0])
    memory = both.memory_analysis()
    return Compiled(forward, both, memory.temp_size_in_bytes if memory else None)


def measure(group: str, shape: Shape, calls: dict[str, Compiled]) -> Iterator[dict]:
    """One row for each implementation."""
    inputs = shape.inputs()
    work = shape.teraflop()
    prepare = {
        (name, what): functools.partial(timed_batch, program, *args, batch_ms=BATCH_MS)
        for name, call in calls.items()
        for what, program, args in (
            ("forward", call.forward, inputs[:3]),
            ("both", call.both, inputs),
        )
        if program is not None and group != "errors"
    }
    times = in_turn(prepare, TURNS if work < 50 else 3)
    for name, call in calls.items():
        row = {**shape._asdict(), "group": group, "implementation": name}
        if call.forward is None or call.both is None:
            yield {**row, "absent": call.absent}
            continue
        if group == "errors":
            yield {**row, "errors": errors(call.both(*inputs), shape)}
            continue
        row["temporary_bytes"] = call.temporary_bytes
        forward, both = (
            statistics.median(cast(list[float], times[name, what])) for what in ("forward", "both")
        )
        row |= {"forward_ms": forward, "both_ms": both}
        row["forward_tflops"] = work / forward * 1e3
        row["backward_tflops"] = 2.5 * work / (both - forward) * 1e3
        yield row


def main() -> None:
    """Measure the groups asked for."""
    platform = jax.default_backend()
    groups = groups_for(platform)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--out", type=Path, default=RESULTS / f"flash_{platform}.jsonl")
    parser.add_argument("--plot", type=Path, help="only plot and print these rows")
    options = parser.parse_args()
    if options.plot:
        rows, out = read_rows(options.plot), options.plot
    else:
        rows, out = [], options.out
        for row in _measured({name: groups[name] for name in options.groups}):
            print(row, flush=True)
            rows.append(row)
            write_rows(out, rows)
    print(table(rows))
    if platform == "gpu" or options.plot:
        print(claims_table(claims(rows)))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is absent; for the plot: --plot {out}")
    else:
        plot(rows, out)


def _measured(groups: dict[str, list[Shape]]) -> Iterator[dict]:
    """Everything is compiled before the first is timed, so that nothing disturbs the timing."""
    plan = [
        (group, shape, name)
        for group, shapes in groups.items()
        for shape in shapes
        for name in PEERS.get(group, RIVALS)
    ]
    programs = compile_all(
        (lower for _, shape, name in plan for lower in lowerings(shape, name)), REFUSALS
    )
    calls = list(map(compiled, programs[::2], programs[1::2]))
    for group, shapes in groups.items():
        for shape in shapes:
            mine = {
                n: c for (g, s, n), c in zip(plan, calls, strict=True) if (g, s) == (group, shape)
            }
            yield from measure(group, shape, mine)


if __name__ == "__main__":
    main()
