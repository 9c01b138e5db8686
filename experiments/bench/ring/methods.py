"""The longest sequences that really train, by the methods of Ring Attention's table 3.

What `experiments.ring_attention.max_context` says of pods by the compiler alone is tried here on
the devices at hand, with the softmax Transformer of 385M parameters. A sequence lies on one device,
by the ring on all of them.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.bench.ring.training import REFUSALS
from experiments.ring_attention.max_context import METHODS, TINY_MODEL, Pod, attention_of, run
from experiments.transnormer.base import PAPER
from experiments.transnormer.training_speed import time_steps
from longctx.device.programs import bytes_needed, compile_all
from longctx.models import transformer
from longctx.parallel.mesh import make_mesh
from longctx.plan import lower_step
from longctx.train.config import RunConfig

MODEL = dataclasses.replace(transformer(PAPER.model), remat="block")
# Tokens on a device in the steps that are compiled first, for devices of some 12 GB.
PROBES = {"vanilla": (4096, 8192, 16384), "others": (32768, 65536, 131072)}
SMOKE_PROBES = {"vanilla": (64, 128, 256), "others": (128, 256, 512)}
# What the runtime and fragmentation take of a device's memory, roughly.
USABLE = 0.95
PARTS = 8  # of the distance of two probes, in which the length between them is found

# By length; or why one was not compiled: XLA tries kernels on the device, which may be too small.
type Steps = Mapping[int, jax.stages.Compiled | jax.errors.JaxRuntimeError]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method on so many devices, and the lengths of its first steps."""

    method: str
    devices: int
    pod: Pod
    probes: tuple[int, ...]

    def config(self, length: int) -> RunConfig:
        """A step that fills the devices with sequences of `length` tokens."""
        return run(self.pod, self.method, length)

    def lower(self, length: int) -> jax.stages.Lowered:
        """That step, traced for the devices that are there."""
        config = self.config(length)
        with attention_of(self.method):
            return lower_step(config, make_mesh(config.mesh))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every method on every number of devices; a ring takes two."""
    model, probes = (TINY_MODEL, SMOKE_PROBES) if options.smoke else (MODEL, PROBES)
    for devices in options.devices:
        pod = Pod(f"{devices} devices", 1, devices, model, {})
        for method in METHODS:
            lengths = probes.get(method, probes["others"])
            if method != "ring":
                yield Cell(method, devices, pod, lengths)
            elif devices > 1:
                yield Cell(method, devices, pod, tuple(devices * n for n in lengths))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The longest sequence by method: told from compiled steps, then trained on for two steps.

    `ran` is false where neither that length runs nor the longest probe below it;
    `longer_may_fit` is true where all probes fit, and longer sequences were not looked for.
    """
    memory = options.memory or jax.devices()[0].memory_stats()["bytes_limit"]
    todo, limit = list(cells(options)), USABLE * memory
    lowerings = (functools.partial(c.lower, n) for c in todo for n in c.probes)
    compiled = iter(compile_all(lowerings, REFUSALS))
    steps = [{n: next(compiled) for n in cell.probes} for cell in todo]
    between = [longest(needed(found), limit) for found in steps]
    lowerings = (functools.partial(c.lower, n) for c, n in zip(todo, between, strict=True))
    last = compile_all(lowerings, REFUSALS)
    for cell, found, length, step in zip(todo, steps, between, last, strict=True):
        fits = {n: s for n, s in {**found, length: step}.items() if needed({n: s})[n] <= limit}
        about = {"method": cell.method, "devices": cell.devices, "memory_bytes": memory}
        about |= {"longer_may_fit": max(cell.probes) in fits}
        yield {"group": "methods", **about, **tried(cell, fits)}


def needed(steps: Steps) -> dict[int, float]:
    """Bytes of a device, by the compiler, by length; infinite where it found too little room."""
    return {
        length: math.inf if isinstance(step, REFUSALS) else bytes_needed(step)
        for length, step in steps.items()
    }


def longest(found: Mapping[int, float], limit: float) -> int:
    """The longest length that fits into `limit`, told from the bytes of probes by length.

    Memory grows linearly with the length or faster: between two probes it is below their chord.
    If all of the probes fit it is the longest of them, if none does the shortest.
    """
    lengths = sorted(found)
    count = sum(found[length] <= limit for length in lengths)
    if count in (0, len(lengths)):
        return lengths[max(0, count - 1)]
    low, high = lengths[count - 1 : count + 1]
    share = (limit - found[low]) / (found[high] - found[low])
    return low + int(share * PARTS) * ((high - low) // PARTS)


def tried(cell: Cell, steps: Steps) -> dict[str, Any]:
    """What became of the longest of the steps that fit, or else of the next one."""
    row: dict[str, Any] = {"ran": False, "failed": "not even the shortest fits"}
    for length in sorted(steps, reverse=True)[:2]:
        config = cell.config(length)
        mesh = make_mesh(config.mesh)
        (timed,) = time_steps("Transformer", [config], [steps[length]], mesh, repeats=1)
        row = {"length": length, "parameters": timed["parameters"], "ran": "seconds" in timed}
        row |= {name: timed[name] for name in ("seconds", "failed") if name in timed}
        row |= {"bytes": bytes_needed(steps[length])}
        if row["ran"]:
            break
    return row


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    what = f"{row['devices']} devices        longest  {row['method']:16}"
    if not row["ran"]:
        return f"{what} NOT RUN: {row['failed']}"
    more = "; longer ones may fit" if row["longer_may_fit"] else ""
    size = f"{row['bytes'] / 1e9:.1f} of {row['memory_bytes'] / 1e9:.1f} GB"
    return f"{what} {row['length']:10,} tokens, {size}, {row['seconds']:.1f} s a step{more}"
