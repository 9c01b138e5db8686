"""`longctx plan`: what a training step costs on a pod, found out without one.

The step is compiled ahead of time for a real topology; the compiler then says how much memory
each device needs and which collectives run when. No device of that kind has to be there, but its
compiler has (`longctx.topologies`).
"""

import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from longctx.cli import parse
from longctx.device.programs import bytes_needed
from longctx.errors import UserError
from longctx.eval.nll import MODEL_FIELDS
from longctx.models import count_parameters
from longctx.parallel.mesh import BATCH, make_mesh
from longctx.parallel.overlap import Move, verify_overlap
from longctx.provenance import origin
from longctx.topologies import memory_of, topology_devices
from longctx.train.config import RunConfig
from longctx.train.flops import device_peak, step_flops
from longctx.train.step import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile the training step of a run for a pod and report memory, collectives and FLOPs."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    # Generation and shape, as in v5p:4x4x4, v5e:16x16, v6e:2x4, tpu7x:2x2x1; 2xv5p:4x4x4 for two
    # slices; h100:8, h200:16 for GPUs, eight to a host.
    topology: str = "v5p:2x2x1"
    # Where the report goes as JSON; empty: only to the screen.
    out: str = ""


def plan(arguments: Sequence[str]) -> None:
    """`longctx plan NAME --topology v5p:4x4x4 [overrides]`."""
    from longctx.commands import find_run

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: longctx plan NAME [--topology v5p:4x4x4] [--out FILE] [overrides of the run]")
        return
    name, *overrides = arguments
    default = PlanOptions(find_run(name))
    options = parse(PlanOptions, f"plan {name}", overrides, default=default)
    report = {"run": name} | report_of(options.run, options.topology)
    show(report)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(report | origin(), indent=2) + "\n")


def compile_step(config: RunConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The training step of a run, compiled for the devices of `mesh`; nothing is allocated."""
    return lower_step(config, mesh).compile()


def lower_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a run, traced for the devices of `mesh`; nothing is allocated."""
    shape = (config.data.batch_size, config.data.sequence_length)
    sharding = NamedSharding(mesh, P(BATCH, "seq"))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        return make_train_step(config).lower(state, dict.fromkeys(MODEL_FIELDS, tokens))


def report_of(config: RunConfig, topology: str) -> dict[str, Any]:
    """Everything that the compiled step says about itself.

    Raises:
      UserError: the mesh of the run does not have as many devices as the topology, or the step
        needs more memory than the compiler is willing to plan for.
    """
    devices = topology_devices(topology)
    if config.mesh.size != len(devices):
        raise UserError(
            f"{topology} has {len(devices)} devices; mesh data x fsdp x seq x tensor = "
            f"{config.mesh.size} must use all of them"
        )
    mesh = make_mesh(config.mesh, devices=devices)
    began, busy = time.perf_counter(), time.process_time()
    try:
        compiled = compile_step(config, mesh)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the compiler's, a rule of ours
        first = str(error).split("\n", maxsplit=1)[0]
        raise UserError(f"the step does not compile for {topology}: {first}") from error
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    memory, available = bytes_per_device(compiled), memory_of(topology)
    length = config.data.sequence_length
    flops = step_flops(config.model, length, config.tokens_per_step) / len(devices)
    peak = device_peak(devices[0])
    return {
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": config.mesh.shape,
        "parameters": count_parameters(config.model),
        "sequence_length": length,
        "tokens_per_step": config.tokens_per_step,
        "compile_seconds": seconds,
        "compile_cpu_seconds": busy,
        "bytes_per_device": memory | {"available": available},
        "fits": None if available is None else memory["all"] <= available,
        "flops_per_device": flops,
        "seconds_at_peak": flops / peak if peak else None,
        "collectives": collectives(verify_overlap(compiled).moves, mesh),
    }


def bytes_per_device(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Memory that a compiled training step needs, by the compiler."""
    memory = compiled.memory_analysis()
    assert memory is not None, "compilers for accelerators report memory"
    return {
        "state_and_batch": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        # The state is donated: outputs that alias arguments need no memory of their own.
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "all": bytes_needed(compiled),
    }


def collectives(moves: Sequence[Move], mesh: Mesh) -> list[dict[str, Any]]:
    """Collectives by kind and mesh axes: how often a step runs them, bytes, and what hides them."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(
        lambda: {"count": 0, "bytes": 0, "exposed": 0, "exposed_bytes": 0}
    )
    for move in moves:
        row = sums[move.kind, "+".join(_axes(move.devices, mesh)) or "?"]
        row["count"] += move.times
        row["bytes"] += move.times * move.bytes
        if move.exposed:
            row["exposed"] += move.times
            row["exposed_bytes"] += move.times * move.bytes
    return [
        {"kind": kind, "axes": axes, **row}
        for (kind, axes), row in sorted(sums.items(), key=lambda item: -item[1]["bytes"])
    ]


def _axes(devices: Sequence[int], mesh: Mesh) -> list[str]:
    """The mesh axes along which the members of a group differ."""
    sizes = list(mesh.shape.values())
    places = [
        [index // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)]
        for index in devices
    ]
    return [axis for axis, along in zip(mesh.shape, zip(*places, strict=True), strict=True)
            if len(set(along)) > 1] if places else []  # fmt: skip


def amount(value: float, unit: str, billion: str = "G") -> str:
    """Three digits of `value` in the largest thousandfold of `unit` that it reaches, up to T."""
    prefixes, digits = ("", "k", "M", billion, "T"), len(str(int(value)))
    power = min((digits - 1) // 3, len(prefixes) - 1)
    decimals = max(0, 3 * power + 3 - digits) if power else 0
    return f"{value / 1000**power:.{decimals}f} {prefixes[power]}{unit}"


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    console, memory = Console(), report["bytes_per_device"]
    used = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    console.print(
        f"{report['run']}: {amount(report['parameters'], ' parameters', billion='B')}, "
        f"{report['tokens_per_step']:,} tokens a step in sequences of {report['sequence_length']:,}"
    )
    console.print(f"{report['topology']}: {report['devices']} devices, mesh {used or 'of one'}")
    verdict = {True: "fits", False: "DOES NOT FIT", None: "capacity unknown"}[report["fits"]]
    console.print(
        f"memory per device: {amount(memory['all'], 'B')} "
        f"(state and batch {amount(memory['state_and_batch'], 'B')}, "
        f"temporary {amount(memory['temporary'], 'B')}): {verdict}"
    )
    console.print(f"compute per device: {amount(report['flops_per_device'], 'FLOP')} a step")
    table = Table(title="collectives of one step, per device")
    for column in ("kind", "axes", "count", "bytes", "exposed", "exposed bytes"):
        table.add_column(column, justify="left" if column in ("kind", "axes") else "right")
    for row in report["collectives"]:
        table.add_row(
            row["kind"],
            row["axes"],
            str(row["count"]),
            amount(row["bytes"], "B"),
            str(row["exposed"]),
            amount(row["exposed_bytes"], "B"),
        )
    console.print(table)
