"""Sequences over several devices: `python -m experiments.bench.ring`, on 1, 2, 4 or 8 of them.

Groups:
  attention  causal attention (bf16, B 1, D 128) by each strategy of `context_attention`, as a share
             of the ideal, which is the best time of one device divided by the devices; the ring's
             overlap from three runs (full, without its moves, without its blocks); errors against
             float64
  training   TNL and the softmax Transformer of 385M parameters: tokens per second and device of
             whole training steps, at a fixed length per device
  longest    the largest total length that the same models train on

The devices are the first 1, 2, 4, 8 that are there, the lengths those of a device and totals.
Writes a row per line (ring.jsonl), a chart beside it, and prints a table. `--xla NAME=VALUE`
compiles with an XLA option, such as xla_gpu_use_memcpy_local_p2p=true. Without the devices:
`python -m experiments.bench.ring.schedule`, `python -m experiments.bench.ring.scaling`.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.bench.ring import attention, training
from experiments.bench.ring.programs import STRATEGIES, heads_pair
from longctx.provenance import read_rows, write_rows

RESULTS = Path(__file__).parents[1] / "results"


class Group(NamedTuple):
    """A kind of measurement."""

    measure: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]
    shown: Callable[[dict[str, Any]], str]


GROUPS = {
    "attention": Group(attention.measure, attention.shown),
    "training": Group(training.measure, training.shown),
    "longest": Group(training.measure_longest, training.shown_longest),
}


def main() -> None:
    """Time, print, and write the rows and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--devices", type=int, nargs="+", default=there)
    parser.add_argument("--per-device", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--totals", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--heads", type=heads_pair, nargs="+", default=[(16, 16), (64, 8)])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--batches", type=int, default=5, help="of calls, whose median is taken")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--memory", type=float, help="bytes of a device, where it does not say")
    parser.add_argument(
        "--xla", type=lambda x: tuple(x.split("=", 1)), nargs="*", default=[], metavar="NAME=VALUE"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", default="ring", help="of the results' files")
    options = parser.parse_args()
    path = options.out / f"{options.name}.jsonl"
    rows = []
    for group in (GROUPS[name] for name in options.groups):
        for row in group.measure(options):
            rows.append(row)
            print(group.shown(row), flush=True)
            write_rows(path, rows)
    if any("of_ideal" in row for row in rows):
        attention.draw_chart(read_rows(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
