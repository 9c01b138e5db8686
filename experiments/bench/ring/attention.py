"""Times of attention over sharded sequences: against one device, in three parts, and its errors."""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.bench._passes import with_gradients
from experiments.bench._timing import REFUSALS, in_turn, timed_batch
from experiments.bench.ring.parts import ALONE, COMMUNICATION, COMPUTE
from experiments.bench.ring.programs import ONE_DEVICE, PASSES, Case
from longctx.compiler import training_options
from longctx.device.programs import compile_all
from pallas_kernels.flash_attention import flash_attention

RESULTS = ("o", "dq", "dk", "dv")
TOTALS = (32768, 131072)
PER_DEVICE = (4096, 8192, 32768)
RANKS = (2, 4, 8)
BATCH_MS = 200.0  # of queued calls: how long several devices take to start does not count then


def measure_ideal(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The ring at fixed total lengths, and its overlap."""
    return measure("ideal", list(ideal_cases(options)), options)


def measure_strategies(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every strategy at fixed lengths per device."""
    return measure("strategies", list(strategy_cases(options, options.devices)), options)


def measure_alone(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One device's part of every strategy, without the others."""
    cases = strategy_cases(options, options.ranks)
    return measure(
        ALONE, [c if c.name in ONE_DEVICE else c._replace(part=ALONE) for c in cases], options
    )


def ideal_cases(options: argparse.Namespace) -> Iterator[Case]:
    """One device; then several, each by itself, and the ring over them, whole and in parts."""
    for length, pair, which in itertools.product(
        options.totals or TOTALS, options.heads or [(16, 16)], PASSES
    ):
        case = functools.partial(Case, length, *pair, which)
        yield from map(case, singles())
        for devices in (n for n in options.devices if n > 1):
            yield from (case(name, devices) for name in singles())
            for part in ("full", COMPUTE, COMMUNICATION):
                yield case("ring", devices, part)


def strategy_cases(options: argparse.Namespace, devices: Sequence[int]) -> Iterator[Case]:
    """One device, then all strategies over several beside it, for each number of devices."""
    many = [n for n in devices if n > 1]
    for local, count, pair, which in itertools.product(
        options.per_device or PER_DEVICE, many, options.heads or [(16, 16), (64, 8)], PASSES
    ):
        case = functools.partial(Case, local * count, *pair, which)
        yield from map(case, singles())
        for name in options.strategies:
            if name != "usp" or count >= 4:
                yield case(name, count)


def singles() -> Sequence[str]:
    """What one device can run."""
    return ONE_DEVICE if jax.default_backend() == "gpu" else ONE_DEVICE[1:]


def measure(
    group: str, todo: Sequence[Case], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per program: its time and its share of the ideal; at the end, rows of errors.

    The ideal is the smaller of our own kernel's and cuDNN's time on the first device, divided by
    the number of devices. All devices at once may take longer, as a ring goes at the pace of the
    slowest: `of_replicas` is the share of the same with each device at a sequence of its own.
    A ring's last row has its overlap, from its full time and those with only its blocks and only
    its moves:

        overlap = (compute + communication - full) / min(compute, communication)

    A program that does not compile or run has the reason in its row, as `failed`.
    """
    todo = list(dict.fromkeys(todo))
    programs, xla = compiled(todo, options)
    times: dict[Case, float] = {}
    for _, beside in itertools.groupby(todo, lambda c: (c.length, c.heads, c.kv_heads, c.which)):
        prepare = {c: functools.partial(ready, c, programs[c]) for c in beside}
        for case, found in in_turn(prepare, options.batches, REFUSALS).items():
            row = {"group": group, **case._asdict(), "xla": xla}
            if isinstance(found, list):
                times[case] = statistics.median(found)
                found = {"ms": times[case], "batches_ms": found}
                yield row | found | compared(case, times)
            else:
                yield row | {"failed": f"{type(found).__name__}: {found}"[:300]}
    if group == ALONE:  # of whose results nothing is known
        return
    shortest = min(case.length for case in todo)
    checked = [c for c in times if c.length == shortest and c.part == "full" and c.replicas == 1]
    exact = functools.lru_cache(maxsize=1)(float64)
    for case in (c for c in checked if c.which == PASSES[1]):
        found = errors(case, programs[case], *exact(case._replace(name="ours", devices=1)))
        yield {"group": group, **case._asdict(), "xla": xla, "errors": found}


def compiled(
    todo: Sequence[Case], options: argparse.Namespace
) -> tuple[dict[Case, Any], dict[str, Any]]:
    """The programs, or what compiling one raised; and the options of XLA."""
    lowerings = (functools.partial(case.lower, jax.devices()) for case in todo)
    with jax.set_mesh(todo[-1].mesh(jax.devices())):
        xla = training_options() | dict(options.xla)
    return dict(zip(todo, compile_all(lowerings, REFUSALS, xla), strict=True)), xla


def ready(case: Case, program: Any) -> Callable[[], float]:
    """Runs a batch of a program, unless compiling or running it fails."""
    if isinstance(program, REFUSALS):
        raise program
    return timed_batch(program, *draw(case), batch_ms=BATCH_MS)


def compared(case: Case, times: dict[Case, float]) -> dict[str, Any]:
    """A program's share of the ideal, or the overlap of a ring."""
    if case.name in ONE_DEVICE or case.part == COMPUTE:
        return {}
    if case.part == COMMUNICATION:
        full, compute = (times.get(case._replace(part=part)) for part in ("full", COMPUTE))
        if full is None or compute is None:
            return {}
        return {"overlap": (compute + times[case] - full) / min(compute, times[case])}
    first, all_at_once = (
        min(
            times.get(case._replace(name=name, devices=n, part="full"), np.inf)
            for name in ONE_DEVICE
        )
        for n in (1, case.devices)
    )
    ideal, found = first / case.devices, {}
    if np.isfinite(first):
        found |= {"ideal_ms": ideal, "of_ideal": ideal / times[case]}
    if np.isfinite(all_at_once):
        found |= {"of_replicas": all_at_once / case.devices / times[case]}
    return found


def draw(case: Case) -> list[Array]:
    """Random q, k, v, do on the devices of a case."""
    name = "ours" if case.name in ONE_DEVICE else "ring"
    part = case.part if case.part == ALONE else "full"
    return _draw(case._replace(which=PASSES[0], name=name, part=part))


@functools.lru_cache(maxsize=3)  # one device's, and several devices' in two ways, of one shape
def _draw(case: Case) -> list[Array]:
    like = case.operands(case.mesh(jax.devices()))

    def normal(key: Array) -> list[Array]:
        keys = jax.random.split(key, len(like))
        return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, like, strict=True)]

    return jax.jit(normal, out_shardings=[x.sharding for x in like])(jax.random.key(0))


def float64(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Operands of `case`, tokens in position order, and o, dq, dk, dv in float64."""
    args = [np.asarray(x) for x in draw(case)]
    both = jax.jit(with_gradients(functools.partial(flash_attention, backend="xla")))
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


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    said = f"{row['ms']:9.3f} ms" if "ms" in row else ""
    said += f" {row['of_ideal']:7.1%} of ideal" if "of_ideal" in row else ""
    said += f", {row['of_replicas']:.1%} of replicas" if "of_replicas" in row else ""
    said += f" overlap {row['overlap']:.1%}" if "overlap" in row else ""
    said += f" error {max(row['errors'].values()):.1e}" if "errors" in row else ""
    said += f" FAILED {row['failed']}" if "failed" in row else ""
    return f"{label(row)} {said}"


def label(row: dict[str, Any]) -> str:
    """The program of a row."""
    local = Case(*(row[field] for field in Case._fields)).local
    where = f"{row['devices']} x {local:6} {row['heads']}:{row['kv_heads']}"
    return f"{where:17} {row['which']:16} {row['name']:10} {row['part']:13}"
