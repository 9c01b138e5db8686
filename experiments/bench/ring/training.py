"""Whole training steps of models whose sequences lie on several devices: speed, and how long.

Both models have 385M parameters, as in TransNormerLLM's ablations. TNL's layers exchange states
(LASP-2), the Transformer's run a ring; blocks are recomputed in the backward pass. For the longest
sequences the ring takes one head after another, and parameters and moments lie split over the
devices, which needs least memory.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.bench._timing import in_turn
from experiments.transnormer.base import PAPER, SMOKE
from experiments.transnormer.training_speed import Running, about, speed, time_steps
from longctx.data.config import DataConfig
from longctx.device.programs import bytes_needed, compile_all
from longctx.errors import UserError
from longctx.models import ModelConfig, ParallelConfig, transformer
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.plan import lower_step
from longctx.train.config import RunConfig

# Lengths on each device are multiples of it, and so many tokens pass an MLP at once.
GRAIN = 1024
SMOKE_GRAIN = 64
PER_DEVICE = (8192, 32768)
BATCH_SECONDS = 0.2  # of queued steps
# Steps in the order of the program: to hide moves, a GPU's scheduler would put off products of
# gradients whose operands then stay in memory.
IN_ORDER = {"xla_gpu_enable_latency_hiding_scheduler": False}
REFUSALS = (jax.errors.JaxRuntimeError,)  # XLA tries kernels on the device, which may be too full


def models(smoke: bool, chunk: int | None = None) -> dict[str, RunConfig]:
    """The runs by name; their length and mesh are set by `over`.

    `chunk` tokens pass an MLP at once; None: as few as is sensible, for the longest sequences.
    """
    base, grain = (SMOKE, SMOKE_GRAIN) if smoke else (PAPER, GRAIN)

    def saving(model: ModelConfig) -> RunConfig:
        mlp = dataclasses.replace(model.mlp, chunk=grain if chunk is None else chunk)
        return dataclasses.replace(base, model=dataclasses.replace(model, remat="block", mlp=mlp))

    return {"TNL": saving(base.model), "Transformer": saving(transformer(base.model))}


def over(run: RunConfig, devices: int, local: int, **options: Any) -> RunConfig:
    """`run` on one sequence of `local` tokens on each of `devices`; `options` of ParallelConfig."""
    parallel = ParallelConfig(strategy="ring", layout="zigzag", **options)
    return dataclasses.replace(
        run,
        data=DataConfig(sequence_length=devices * local, batch_size=1),
        mesh=MeshConfig(seq=devices),
        parallel=parallel,
    )


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of ParallelConfig."""
    names = ("fsdp_over_seq", "gather", "states")
    return {name: getattr(options, name) for name in names}


def sparing(run: RunConfig, devices: int, local: int) -> RunConfig:
    """`over` with as little memory as the ring can do with, parameters split over the devices."""
    groups = run.model.softmax.num_kv_heads
    return over(run, devices, local, head_groups=groups, fsdp_over_seq=True)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second of a device, and beside it that of the first number of devices.

    Steps that are compared take turns: their states are on the devices at the same time.
    """
    runs, lengths = models(options.smoke, options.chunk), options.per_device or PER_DEVICE
    parallel = chosen(options)
    configs = {
        (name, local, devices): over(runs[name], devices, local, **parallel)
        for name, local, devices in itertools.product(options.models, lengths, options.devices)
    }
    compiled = compile_all(map(lowering, configs.values()), options=dict(options.xla) or None)
    steps = dict(zip(configs, compiled, strict=True))
    for name, local in itertools.product(options.models, lengths):
        beside = {n: (configs[name, local, n], steps[name, local, n]) for n in options.devices}
        what = {"group": "training", "per_device": local, "chunk": runs[name].model.mlp.chunk}
        what |= parallel | {"xla": dict(options.xla)}
        first = None
        for devices, found in timed(beside, options.batches):
            row = what | about(name, beside[devices][0]) | found | {"devices": devices}
            if "failed" not in found:
                per_device = found["tokens_per_second"] / devices
                first = first or per_device
                row |= {"tokens_per_second_per_device": per_device, "of_first": per_device / first}
            yield row


def timed(
    programs: Mapping[int, tuple[RunConfig, jax.stages.Compiled]], batches: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """How fast steps are on several numbers of devices, or why one failed."""

    def ready(config: RunConfig, step: jax.stages.Compiled) -> Callable[[], float]:
        run = Running(config, make_mesh(config.mesh)).steps(config, step)
        return functools.partial(run, max(1, int(BATCH_SECONDS / run())))

    prepare = {devices: functools.partial(ready, *program) for devices, program in programs.items()}
    for devices, seconds in in_turn(prepare, batches, REFUSALS).items():
        if isinstance(seconds, list):
            fast = speed(*programs[devices], devices, statistics.median(seconds))
            yield devices, {"batches_seconds": seconds, **fast}
        else:  # keep what is measured
            yield devices, {"failed": str(seconds)[:200]}


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    what = f"{row['devices']} x {row['per_device']:6}      training {row['model']:12}"
    if "failed" in row:
        return f"{what} {row['failed']}"
    speed = f"{row['tokens_per_second_per_device']:12,.0f} tokens/s of a device"
    return f"{what} {speed}, {row['of_first']:.1%} of the first"


def measure_longest(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The largest total length on which a step runs.

    Steps of two short lengths tell what should fit. The compiler schedules steps near the limit
    otherwise, to save memory: so `tries` lengths around that are compiled, the longest that fits
    is run, and if it is the first or none fits as many more are tried above or below.
    """
    limit = options.memory or jax.devices()[0].memory_stats()["bytes_limit"]
    runs, xla = models(options.smoke), IN_ORDER if jax.default_backend() == "gpu" else {}
    wanted = [(name, devices) for name in options.models for devices in options.devices]
    short = (
        lowering(sparing(runs[name], devices, local))
        for name, devices in wanted
        for local in probed(runs[name])
    )
    probes = compile_all(short, options=xla or None)
    searches = [
        Search(name, runs[name], devices, longest(runs[name], devices, pair, limit), options.tries)
        for (name, devices), pair in zip(wanted, itertools.batched(probes, 2), strict=True)
    ]
    alone: dict[str, int] = {}
    while searches:
        todo = [search.next() for search in searches]
        lowerings = map(lowering, itertools.chain(*todo))
        steps = iter(compile_all(lowerings, REFUSALS, xla or None))
        for search, configs in zip(tuple(searches), todo, strict=True):
            search.run(configs, [next(steps) for _ in configs])
            if search.ended:
                searches.remove(search)
                row = search.row()
                first = alone.setdefault(search.name, row["per_device"])
                yield row | {"xla": xla, "of_first": row["per_device"] / first}


@dataclasses.dataclass
class Search:
    """The longest sequence of one model on so many devices."""

    name: str
    model: RunConfig
    devices: int
    predicted: dict[str, Any]  # by `longest`
    tries: int
    needed: dict[int, int | None] = dataclasses.field(default_factory=dict)  # None: not compiled
    longest: int | None = None  # tokens on each device of what ran

    @property
    def ended(self) -> bool:
        """Whether something ran, and nothing longer did."""
        return self.longest is not None and self.longest < max(self.needed)

    def next(self) -> list[RunConfig]:
        """Steps to try next, the longest first, a 64th apart."""
        length, grain = self.predicted["per_device"], self.model.model.mlp.chunk
        apart = max(grain, length // 64 // grain * grain)
        if not self.needed:
            top = length + self.tries // 2 * apart
        elif self.longest is None:
            top = min(self.needed) - apart
        else:
            top = self.longest + self.tries * apart
        lengths = [n for i in range(self.tries) if (n := top - i * apart) > 0]
        if not lengths:
            raise UserError(f"{self.name} fits {self.devices} devices at none of {self.needed}")
        return [sparing(self.model, self.devices, length) for length in lengths]

    def run(self, configs: Sequence[RunConfig], steps: Sequence[Any]) -> None:
        """Run the first, which is the longest, that the compiler and the device let fit."""
        for config, step in zip(configs, steps, strict=True):
            length = config.data.sequence_length // self.devices
            needed = None if isinstance(step, REFUSALS) else bytes_needed(step)
            self.needed[length] = needed
            fits = needed is not None and needed <= self.predicted["memory_bytes"]
            if fits and length > (self.longest or 0) and _runs(self.name, config, step):
                self.longest = length

    def row(self) -> dict[str, Any]:
        """What was found, beside what had been predicted."""
        assert self.longest is not None
        found = {"per_device": self.longest, "length": self.longest * self.devices}
        needed = {str(n): self.needed[n] for n in sorted(self.needed, reverse=True)}
        return self.predicted | {"model": self.name, **found, "needed": needed}


def probed(run: RunConfig) -> tuple[int, int]:
    """Tokens per device of the programs from which memory at other lengths is told."""
    return 64 * run.model.mlp.chunk, 128 * run.model.mlp.chunk


def longest(
    run: RunConfig, devices: int, probes: Sequence[jax.stages.Compiled], limit: float
) -> dict[str, Any]:
    """The most tokens per device for which a step's memory, by the compiler, stays in `limit`.

    Memory is taken to be linear in the length, from the steps at the two `probed` lengths.

    Raises:
      UserError: not even the shortest length fits.
    """
    grain, lengths = run.model.mlp.chunk, probed(run)
    needed = [bytes_needed(step) for step in probes]
    per_token = (needed[1] - needed[0]) / (lengths[1] - lengths[0])
    local = int((limit - needed[0]) / per_token + lengths[0]) // grain * grain
    if local < grain:
        raise UserError(f"{needed[0]:,} bytes of {lengths[0]} tokens do not fit into {limit:,.0f}")
    return {
        "group": "longest",
        "devices": devices,
        "per_device": local,
        "length": devices * local,
        "memory_bytes": limit,
        "bytes_per_token": per_token,
        "fixed_bytes": needed[0] - per_token * lengths[0],
        "probed": dict(zip(map(str, lengths), needed, strict=True)),
    }


def lowering(config: RunConfig) -> Callable[[], jax.stages.Lowered]:
    """Traces a step for the devices that are there."""
    return lambda: lower_step(config, make_mesh(config.mesh))


def _runs(name: str, config: RunConfig, step: jax.stages.Compiled) -> bool:
    """Whether training steps fit into the devices that are there."""
    (row,) = time_steps(name, [config], [step], make_mesh(config.mesh), repeats=1)
    failure = row.get("failed")
    if failure is not None and "RESOURCE_EXHAUSTED" not in failure:
        raise RuntimeError(failure)
    return failure is None


def shown_longest(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    return (
        f"{row['devices']} devices        longest  {row['model']:12} {row['length']:12,} tokens in "
        f"all, {row['of_first']:.1%} of the first per device"
    )
