"""What the compilers make of the ring's programs: `python -m experiments.bench.ring.schedule`.

The programs that `python -m experiments.bench.ring` times are compiled ahead of time for 4, 8 and
16 devices that need not be there, and read: every move and what is computed while it runs
(`verify_overlap`), and the memory that each device needs. This proves the order of events, not how
long they take: nothing here was run.

Needs libtpu, for H100 the CUDA plugin of jax and ptxas. Appends a row per program to
results/ring_schedule_CHIP.jsonl; programs that have a row there are not compiled again.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

from experiments.bench.ring.programs import PASSES, STRATEGIES, Case, heads_pair
from experiments.bench.ring.scaling import case_of
from experiments.bench.ring.topology import TPUS, devices_of
from longctx.compiler import training_options
from longctx.parallel import verify_overlap
from longctx.provenance import origin, read_rows

RESULTS = Path(__file__).parents[1] / "results"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The grid of programs."""
    for name, devices, local, (heads, kv_heads), which in itertools.product(
        options.strategies, options.devices, options.per_device, options.heads, options.passes
    ):
        yield Case(local * devices, heads, kv_heads, which, name, devices)


def row_of(case: Case, chip: str) -> dict[str, Any]:
    """Compile a case for `chip` and read it."""
    devices = devices_of(chip, case.devices)
    with jax.set_mesh(case.mesh(devices)):
        options = training_options()
    compiled = case.lower(devices).compile(compiler_options=options)
    moves = verify_overlap(compiled).moves
    memory = compiled.memory_analysis()
    assert memory is not None, "compilers for accelerators report memory"

    def sums(kind: str) -> dict[str, int]:
        chosen = [move for move in moves if move.kind == kind]
        return {
            "count": len(chosen),
            "bytes": sum(move.bytes for move in chosen),
            "exposed": sum(move.exposed for move in chosen),
            "exposed_bytes": sum(move.bytes for move in chosen if move.exposed),
            "synchronous": sum(move.synchronous for move in chosen),
        }

    return {
        "chip": chip,
        **case._asdict(),
        "moves": {kind: sums(kind) for kind in sorted({move.kind for move in moves})},
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main() -> None:
    """Compile what has no row yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=[*TPUS, "h100"])
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--per-device", type=int, nargs="+", default=[8192], help="tokens")
    parser.add_argument("--heads", type=heads_pair, nargs="+", default=[(16, 16), (64, 8)])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward_backward"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    path = options.out / f"ring_schedule_{options.chip}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_rows(path) if path.exists() else []
    done = set(map(case_of, known))
    todo = [case for case in cases(options) if case not in done]
    for case in track(todo, f"compiling for {options.chip}"):
        row = row_of(case, options.chip)
        with path.open("a") as file:
            file.write(json.dumps(row | origin()) + "\n")
        exposed = sum(kind["exposed_bytes"] for kind in row["moves"].values())
        print(f"{case}: {exposed:,} B exposed, {row['temporary_bytes']:,} B temporary", flush=True)


if __name__ == "__main__":
    main()
