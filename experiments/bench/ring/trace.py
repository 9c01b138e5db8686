"""Where the time of training steps and of rings goes, from the profiler's trace on GPUs.

Of each device: how long it computes, how long moves run beside that and alone, and how long it does
nothing. Beside the same step on one device this tells whether time is lost to moves that are not
hidden, to compute that slows down while moves take their share of the chip, or to waiting. XLA
launches kernels one by one while it is traced, which by itself takes longer.
"""

import argparse
import functools
import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

from experiments.bench._timing import REFUSALS, timed_batch
from experiments.bench.ring import attention, training
from experiments.transnormer.training_speed import random_batch
from longctx.device.programs import compile_all
from longctx.errors import UserError
from longctx.parallel.mesh import make_mesh
from longctx.train.config import RunConfig
from longctx.train.step import create_state

CALLS = 4  # of a ring, queued as when it is timed
# Kernels that move: NCCL's, XLA's own, and copies from one GPU's memory into another's.
MOVES = re.compile(r"nccl\w*?Kernel_([a-z]+)|(all_?reduce)|(memcpyp2p)", re.IGNORECASE)


class Span(NamedTuple):
    """A kernel on a device, in nanoseconds."""

    start: float
    end: float
    name: str = ""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per device of each step."""
    runs = training.models(options.smoke, options.chunk)
    lengths = options.per_device or training.PER_DEVICE
    cases = list(itertools.product(options.models, lengths, options.devices))
    parallel = training.chosen(options)
    configs = [training.over(runs[name], n, local, **parallel) for name, local, n in cases]
    steps = compile_all(map(training.lowering, configs), options=dict(options.xla) or None)
    for (name, local, devices), config, step in zip(cases, configs, steps, strict=True):
        about = {"group": "trace", "model": name, "devices": devices, "per_device": local}
        about |= {"chunk": config.model.mlp.chunk, "xla": dict(options.xla)} | parallel
        for device, spans in traced(steps_of(config, step)).items():
            yield about | {"device_number": device, **spent(spans)}


def measure_rings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per device of the programs of `ideal` on several devices; `ms` is without profiler."""
    todo = [case for case in attention.ideal_cases(options) if case.devices > 1]
    programs, xla = attention.compiled(todo, options)
    for case, program in programs.items():
        if isinstance(program, REFUSALS):
            raise program
        args, about = attention.draw(case), {"group": "timeline", **case._asdict(), "xla": xla}
        about["ms"] = timed_batch(program, *args, batch_ms=attention.BATCH_MS)()
        for device, spans in traced(functools.partial(queued, program, args)).items():
            yield about | {"device_number": device, **spent(spans, CALLS)}


def queued(program: jax.stages.Compiled, args: Sequence[Any]) -> Any:
    """Results of the last of `CALLS`."""
    out = None
    for _ in range(CALLS):
        out = program(*args)
    return out


def steps_of(config: RunConfig, step: jax.stages.Compiled) -> Callable[[], Any]:
    """A function of which each call runs the next step."""
    mesh = make_mesh(config.mesh)
    batch = random_batch(config, np.random.default_rng(0), mesh)
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return run


def traced(run: Callable[[], Any]) -> dict[int, list[Span]]:
    """The kernels of a warm call of `run`, by number of the device.

    Raises:
      UserError: the trace holds no GPU.
    """
    for _ in range(2):
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        found = kernels(ProfileData.from_file(str(path)))
    if not found:
        raise UserError(f"no kernels of GPUs in a trace on {jax.devices()[0].platform}")
    return found


def kernels(profile: ProfileData) -> dict[int, list[Span]]:
    """What ran on the streams of each GPU."""
    found = {}
    for plane in profile.planes:
        number = re.fullmatch(r"/device:GPU:(\d+)", plane.name)
        streams = [line for line in plane.lines if line.name.startswith("Stream")]
        events = [event for line in streams for event in line.events]
        if number and events:
            found[int(number[1])] = [
                Span(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in events
            ]
    return found


def spent(spans: Sequence[Span], calls: int = 1) -> dict[str, Any]:
    """Milliseconds of a device for one of so many calls, from the first kernel to the last."""
    kinds: dict[str, list[Span]] = {}
    computing = []
    for span in spans:
        if kind := MOVES.search(span.name):
            kinds.setdefault(next(filter(None, kind.groups())), []).append(span)
        else:
            computing.append(span)
    moving = list(itertools.chain(*kinds.values()))
    busy, computes = covered(spans), covered(computing)
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    sums: dict[str, float] = defaultdict(float)
    for span in computing:
        sums[span.name] += span.end - span.start
    longest = sorted(sums.items(), key=lambda item: -item[1])[:20]
    per = 1e6 * calls
    return {
        "whole_ms": whole / per,
        "computing_ms": computes / per,
        "moving_ms": covered(moving) / per,
        "moving_alone_ms": (busy - computes) / per,
        "idle_ms": (whole - busy) / per,
        "kernels": len(computing) // calls,
        "kernels_ms": sum(sums.values()) / per,
        "moves": {k: [len(ran) // calls, covered(ran) / per] for k, ran in sorted(kinds.items())},
        "longest_kernels_ms": {name: time / per for name, time in longest},
    }


def covered(spans: Sequence[Span]) -> float:
    """Nanoseconds during which any of them runs."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    moves = ", ".join(f"{count} {kind} {ms:.1f}" for kind, (count, ms) in row["moves"].items())
    if row["group"] == "trace":
        what = f"{row['devices']} x {row['per_device']:6} {row['model']:12}"
    else:
        what = f"{attention.label(row)} {row['ms']:9.3f} ms;"
    return (
        f"{what} GPU {row['device_number']}: "
        f"{row['whole_ms']:.1f} ms = computing {row['computing_ms']:.1f} "
        f"+ moving alone {row['moving_alone_ms']:.1f} + idle {row['idle_ms']:.1f}; "
        f"moving {row['moving_ms']:.1f} ({moves}); "
        f"{row['kernels']} kernels {row['kernels_ms']:.1f}"
    )
