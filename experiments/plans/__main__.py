"""What training steps need on pods, by the compiler, without a pod: `python -m experiments.plans`.

Every row of results/plans.jsonl is a report of `longctx plan`. Names as arguments remake those
rows only. Two CPU cores, up to ten minutes a row; libtpu must be installed, for H100 the CUDA
plugin of jax and ptxas.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.bench.ring import training
from experiments.bench.ring.topology import TPUS
from longctx.configs import RUNS
from longctx.errors import UserError
from longctx.models import ParallelConfig
from longctx.parallel import MeshConfig
from longctx.plan import report_of, show
from longctx.provenance import origin, read_rows
from longctx.topologies import topology_devices
from longctx.train.config import RunConfig

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
CONTIGUOUS = ParallelConfig()
H100S = {count: f"h100:{count}" for count in (4, 8, 16)}
RING = ParallelConfig(strategy="ring", layout="zigzag")


def run(
    name: str, mesh: MeshConfig, length: int, batch: int, parallel: ParallelConfig = CONTIGUOUS
) -> RunConfig:
    """A named run on a mesh, with every block recomputed in the backward pass."""
    base = RUNS[name]
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, remat="block"),
        mesh=mesh,
        parallel=parallel,
        data=dataclasses.replace(base.data, sequence_length=length, batch_size=batch),
    )


# Name -> topology and run.
PLANS: Mapping[str, tuple[str, RunConfig]] = {
    "TNL 7B, 128K tokens": (
        "v5p:4x4x4",
        run("tnl-7b", MeshConfig(fsdp=16, seq=4), 2**17, 16),
    ),
    "TNL 7B, 1M tokens": (
        "v5p:4x4x4",
        run("tnl-7b", MeshConfig(fsdp=4, seq=16), 2**20, 4),
    ),
    "Llama 3 8B, ring attention, 1M tokens": (
        "v5p:4x4x4",
        run("llama-3-8b", MeshConfig(fsdp=4, seq=16), 2**20, 4, RING),
    ),
    "Llama 3 8B, ring attention, 128K tokens, two hosts of H100": (
        "h100:16",
        run("llama-3-8b", MeshConfig(fsdp=4, seq=4), 2**17, 4, RING),
    ),
    "TNL 175B, 8K tokens, v5p": (
        "v5p:4x4x4",
        run("tnl-175b", MeshConfig(fsdp=16, tensor=4), 2**13, 32),
    ),
    "TNL 175B, 8K tokens, half of that v5p": (
        "v5p:2x4x4",
        run("tnl-175b", MeshConfig(fsdp=8, tensor=4), 2**13, 8),
    ),
    "TNL 175B, 8K tokens, two slices of v5e": (
        "2xv5e:16x16",
        run("tnl-175b", MeshConfig(fsdp=32, tensor=16), 2**13, 32),
    ),
    "TNL 175B, 8K tokens, one slice of v5e": (
        "v5e:16x16",
        run("tnl-175b", MeshConfig(fsdp=16, tensor=16), 2**13, 16),
    ),
    # What `python -m experiments.bench.ring --groups training` times where there are devices.
    **{
        f"{name} 385M, {tokens} tokens on each of {count}, {chip}": (
            topology,
            training.over(base, count, tokens),
        )
        for name, base in training.models(smoke=False).items()
        for tokens in training.PER_DEVICE[-1:]
        for chip, topologies in (("H100", H100S), ("v5p", TPUS["v5p"]))
        for count, topology in topologies.items()
    },
}


def main() -> None:
    """Compile, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        choices=PLANS,
        default=list(PLANS),
        metavar="NAME",
        help=f"of {', '.join(PLANS)}; all by default",
    )
    names = parser.parse_args().names
    rows = {row["name"]: row for row in read_rows(RESULTS)} if RESULTS.exists() else {}
    for name in names:
        topology, config = PLANS[name]
        Console().rule(f"{name}: {topology}")
        rows[name] = {"name": name} | report(name, topology, config) | origin()
        kept = [json.dumps(rows[n]) + "\n" for n in PLANS if n in rows]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(kept))


def report(name: str, topology: str, config: RunConfig) -> dict[str, Any]:
    """What `longctx plan` says; or why the compiler refuses, which is an answer too."""
    topology_devices(topology)  # that there is no compiler is none
    try:
        found = {"run": name} | report_of(config, topology)
    except UserError as error:
        Console().print(str(error))
        return {"topology": topology, "mesh": config.mesh.shape, "refused": str(error)}
    show(found)
    return found


if __name__ == "__main__":
    main()
