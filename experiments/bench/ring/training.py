"""Whole training steps of models whose sequences lie on several devices: speed, and how long.

Both models have 385M parameters, as in TransNormerLLM's ablations. TNL's layers exchange states
(LASP-2), the Transformer's run a ring; blocks are recomputed in the backward pass.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from experiments.transnormer.base import PAPER, SMOKE
from experiments.transnormer.training_speed import time_steps
from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.models import ModelConfig, ParallelConfig, transformer
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.plan import bytes_per_device, compile_step
from longctx.train.config import RunConfig

# What the runtime and fragmentation take of a device's memory, roughly.
USABLE = 0.95
# Lengths on each device are multiples of it, and so many tokens pass an MLP at once.
GRAIN = 1024
SMOKE_GRAIN = 64


def models(smoke: bool) -> dict[str, RunConfig]:
    """The runs by name; their length and mesh are set by `over`."""
    base, grain = (SMOKE, SMOKE_GRAIN) if smoke else (PAPER, GRAIN)

    def saving(model: ModelConfig) -> RunConfig:
        mlp = dataclasses.replace(model.mlp, chunk=grain)
        return dataclasses.replace(base, model=dataclasses.replace(model, remat="block", mlp=mlp))

    return {"TNL": saving(base.model), "Transformer": saving(transformer(base.model))}


def over(run: RunConfig, devices: int, local: int) -> RunConfig:
    """`run` on one sequence of `local` tokens on each of `devices`."""
    return dataclasses.replace(
        run,
        data=DataConfig(sequence_length=devices * local, batch_size=1),
        mesh=MeshConfig(seq=devices),
        parallel=ParallelConfig(strategy="ring", layout="zigzag"),
    )


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second of a device, and beside it that of one device at the same length each."""
    alone: dict[tuple[str, int], float] = {}
    for devices in options.devices:
        mesh = make_mesh(seq=devices)
        for name, run in models(options.smoke).items():
            configs = [over(run, devices, local) for local in options.per_device]
            with jax.set_mesh(mesh):
                rows = time_steps(name, configs, mesh)
            for local, row in zip(options.per_device, rows, strict=True):
                row = {"group": "training", **row, "devices": devices, "per_device": local}
                if "failed" not in row:
                    speed = row["tokens_per_second"] / devices
                    first = alone.setdefault((name, local), speed)
                    row |= {"tokens_per_second_per_device": speed, "of_first": speed / first}
                yield row


def shown(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    what = f"{row['devices']} x {row['per_device']:6}      training {row['model']:12}"
    if "failed" in row:
        return f"{what} {row['failed']}"
    speed = f"{row['tokens_per_second_per_device']:12,.0f} tokens/s of a device"
    return f"{what} {speed}, {row['of_first']:.1%} of the first"


def measure_longest(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The largest total length on which a step runs: what the compiler says fits, then tried."""
    limit = options.memory or jax.devices()[0].memory_stats()["bytes_limit"]
    alone: dict[str, float] = {}
    for devices in options.devices:
        for name, run in models(options.smoke).items():
            row = longest(run, devices, jax.devices(), limit)
            local, grain = row["per_device"], run.model.mlp.chunk
            while not _runs(name, over(run, devices, local)):
                local -= max(grain, local // 64 // grain * grain)
            length = local * devices
            first = alone.setdefault(name, length / devices)
            row |= {"model": name, "per_device": local, "length": length, "ran": True}
            yield row | {"of_first": length / devices / first}


def longest(
    run: RunConfig, devices: int, kind: Any, limit: float, probes: tuple[int, int] = (16, 32)
) -> dict[str, Any]:
    """The most tokens per device for which a step's memory, by the compiler, stays in `limit`.

    Memory is taken to be linear in the length, from programs of two lengths, `probes` grains.

    Raises:
      UserError: not even the shortest length fits.
    """
    mesh, grain = make_mesh(seq=devices, devices=kind), run.model.mlp.chunk
    lengths = [grain * probe for probe in probes]
    needed = [bytes_per_device(compile_step(over(run, devices, n), mesh))["all"] for n in lengths]
    per_token = (needed[1] - needed[0]) / (lengths[1] - lengths[0])
    local = int((USABLE * limit - needed[0]) / per_token + lengths[0]) // grain * grain
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


def _runs(name: str, config: RunConfig) -> bool:
    """Whether training steps fit into the devices that are there."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        (row,) = time_steps(name, [config], mesh)
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
