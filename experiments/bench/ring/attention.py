"""Times of attention over sharded sequences: against one device, in three parts, and its errors."""

import argparse
import concurrent.futures
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.bench._timing import time_ms
from experiments.bench.ring.programs import ONE_DEVICE, PASSES, WIDTH, Case
from pallas_kernels.flash_attention import flash_attention

# Float64 attention of longer sequences takes too long.
LONGEST_CHECKED = 32768
RESULTS = ("o", "dq", "dk", "dv")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What to run, in the order of the table: one device first, then the strategies beside it."""
    many = [n for n in options.devices if n > 1]
    devices_of: dict[int, set[int]] = {length: set(many) for length in options.totals}
    for n in many:
        for local in options.per_device:
            devices_of.setdefault(n * local, set()).add(n)
    for length, (heads, kv_heads) in (
        (length, pair) for length in sorted(devices_of) for pair in options.heads
    ):
        for which in PASSES:
            case = functools.partial(Case, length, heads, kv_heads, which)
            if jax.default_backend() == "gpu":
                yield case("cudnn")
            yield case("ours")
            for n in sorted(devices_of[length]):
                for name in options.strategies:
                    if name != "usp" or n >= 4:
                        yield case(name, n)
                if "ring" in options.strategies:
                    yield case("ring", n, "compute")
                    yield case("ring", n, "communication")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per program: its time, its share of the ideal, its errors, and the ring's overlap.

    The ideal is the smaller of our own kernel's and cuDNN's time on one device, divided by the
    number of devices. A ring's last row has its overlap, from its full time and those with only
    its blocks and only its moves:

        overlap = (compute + communication - full) / min(compute, communication)
    """
    todo = list(cases(options))
    programs = compile_all(todo, dict(options.xla))
    times: dict[Case, float] = {}
    exact = functools.lru_cache(maxsize=1)(float64)
    for case in todo:
        program, one = programs[case], case._replace(devices=1, part="full")
        mesh = case.mesh(jax.devices())
        times[case] = time_ms(program, *draw(case, mesh), batches=options.batches)
        row = {"group": "attention", **case._asdict(), "ms": times[case], "xla": dict(options.xla)}
        if case.part == "full" and case.devices > 1:
            single = (times.get(one._replace(name=name), np.inf) for name in ONE_DEVICE)
            row["ideal_ms"] = min(single) / case.devices
            row["of_ideal"] = row["ideal_ms"] / times[case]
        if case.part == "full" and case.which == PASSES[1] and case.length <= LONGEST_CHECKED:
            row["errors"] = errors(case, program, *exact(one._replace(name="ours")))
        if case.part == "communication":
            full, compute = (times[case._replace(part=p)] for p in ("full", "compute"))
            hidden = compute + times[case] - full
            row["overlap"] = hidden / min(compute, times[case])
        yield row


def compile_all(todo: Sequence[Case], xla: dict[str, str]) -> dict[Case, Any]:
    """All programs, before any is timed: traced one by one, compiled by a pool of threads."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiling = {
            case: pool.submit(case.lower(jax.devices()).compile, compiler_options=xla or None)
            for case in todo
        }
    return {case: done.result() for case, done in compiling.items()}


def draw(case: Case, mesh: jax.sharding.Mesh) -> list[Array]:
    """Random q, k, v, do on the devices of `mesh`."""
    return [
        jax.jit(
            lambda key, like=like: jax.random.normal(key, like.shape, like.dtype),
            out_shardings=like.sharding,
        )(jax.random.key(seed))
        for seed, like in enumerate(case.operands(mesh))
    ]


def float64(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Operands of `case`, tokens in position order, and o, dq, dk, dv in float64."""
    args = [np.asarray(x) for x in draw(case, case.mesh(jax.devices()))]

    @jax.jit
    def both(q: Array, k: Array, v: Array, do: Array) -> Any:
        o, pull = jax.vjp(functools.partial(flash_attention, backend="xla"), q, k, v)
        return o, *pull(do)

    with jax.enable_x64(True):
        return args, [np.asarray(x) for x in both(*(jnp.asarray(x, jnp.float64) for x in args))]


def errors(
    case: Case, program: Any, args: Sequence[np.ndarray], exact: Sequence[np.ndarray]
) -> dict[str, float]:
    """Relative RMS errors of o, dq, dk, dv against float64."""
    like = case.operands(case.mesh(jax.devices()))
    placed = [
        jax.device_put(case.layout.apply(x), abstract.sharding)
        for x, abstract in zip(args, like, strict=True)
    ]
    got = (case.layout.invert(np.asarray(x)).astype(np.float64) for x in program(*placed))
    return {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, a, b in zip(RESULTS, got, exact, strict=True)
    }


def size_of(row: dict[str, Any]) -> str:
    """Devices and tokens of each."""
    return f"{row['devices']} x {row['length'] // row['devices']}"


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    said = f"{row['of_ideal']:7.1%} of ideal" if "of_ideal" in row else ""
    said += f" overlap {row['overlap']:.1%}" if "overlap" in row else ""
    said += f" error {max(row['errors'].values()):.1e}" if "errors" in row else ""
    where = (
        f"{row['devices']} x {row['length'] // row['devices']:6} {row['heads']}:{row['kv_heads']}"
    )
    program = f"{row['which']:16} {row['name']:10} {row['part']:13}"
    return f"{where:17} {program} {row['ms']:9.3f} ms {said}"


def draw_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of the ideal by strategy, one panel per pass."""
    rows = [row for row in rows if "of_ideal" in row]
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            line = [row for row in rows if row["which"] == which and row["name"] == name]
            axes.plot(
                [f"{size_of(r)}\n{r['heads']}:{r['kv_heads']}" for r in line],
                [row["of_ideal"] for row in line],
                "o",
                label=name,
            )
        axes.set(title=which.replace("_", " + "), ylabel="share of ideal", ylim=(0, 1.1))
        axes.axhline(0.95, color="grey", linewidth=0.5)
        axes.grid(alpha=0.3)
        axes.legend()
    width = f"D = {WIDTH}, devices x tokens of each"
    figure.suptitle(f"causal attention on {rows[0]['device']}, {width}, heads")
    figure.savefig(path, dpi=150)
