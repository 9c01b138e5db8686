"""Sequences over several devices: `python -m experiments.bench.ring`, on 1, 2, 4 or 8 of them.

Groups, the most telling first:
  ideal       causal attention by a zigzag ring (bf16, B 1, D 128) at total lengths, as a share of
              the ideal, which is the best time of one device divided by the devices; its overlap
              from three runs (full, without its moves, without its blocks)
  strategies  the same at lengths per device by each strategy of `context_attention`, and which of
              them "auto" picks, with a chart
  alone       only if named: on one device, what one of `--ranks` devices computes by each strategy
              of `strategies`, which bounds what so many can reach: moves cost nothing
  training    TNL and the softmax Transformer of 385M parameters: tokens per second and device of
              whole training steps, at lengths per device
  methods     the longest sequence on which the softmax Transformer trains with vanilla, memory-
              efficient and blockwise attention, and by the ring
  longest     the largest total length that the same models train on. A softmax step that fills a
              large device takes a quarter of an hour: XLA_PYTHON_CLIENT_MEM_FRACTION=0.15 makes
              small devices of them, for methods too (rows say how much memory there was)
  trace       only if named: where the time of the training steps goes, by the profiler: computing,
              moving beside it or alone, or idle
  timeline    only if named: the same of the programs of `ideal`

The devices are the first 1, 2, 4, 8 that are there. Errors against float64 come last in a group, at
its shortest length. Each group writes its rows, each at once, to NAME_GROUP.jsonl. `--xla
NAME=VALUE` compiles all but methods and longest with an XLA option, such as
xla_gpu_use_memcpy_local_p2p=true. Without the devices: `python -m experiments.bench.ring.schedule`,
`python -m experiments.bench.ring.scaling`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax

from experiments.bench.ring import attention, methods, trace, training
from experiments.bench.ring.chart import draw_chart
from experiments.bench.ring.programs import STRATEGIES, heads_pair
from longctx.nn.stack import Gather
from longctx.parallel.lasp import Exchange
from longctx.provenance import read_rows, write_rows

RESULTS = Path(__file__).parents[1] / "results"
MODELS = ("TNL", "Transformer")


class Group(NamedTuple):
    """A kind of measurement."""

    measure: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]
    shown: Callable[[dict[str, Any]], str]


GROUPS = {
    "ideal": Group(attention.measure_ideal, attention.shown),
    "strategies": Group(attention.measure_strategies, attention.shown),
    "alone": Group(attention.measure_alone, attention.shown),
    "training": Group(training.measure, training.shown),
    "methods": Group(methods.measure, methods.shown),
    "longest": Group(training.measure_longest, training.shown_longest),
    "trace": Group(trace.measure, trace.shown),
    "timeline": Group(trace.measure_rings, trace.shown),
}
IF_NAMED = ("alone", "trace", "timeline")


def main() -> int:
    """Time, print, and write the rows and the chart; 1 if something failed."""
    options = parse()
    stop = time.monotonic() + options.seconds
    failed = False
    for name in options.groups:
        if time.monotonic() >= stop:
            print(f"out of time: {name!r} is not measured")
            continue
        path = options.out / f"{options.name}_{name}.jsonl"
        write_rows(path, printed(name, options, stop))
        rows = read_rows(path)
        failed |= any("failed" in row for row in rows)
        if name == "strategies" and any("of_ideal" in row for row in rows):
            draw_chart(rows, path.with_suffix(".png"))
    return int(failed)


def printed(name: str, options: argparse.Namespace, stop: float) -> Iterator[dict[str, Any]]:
    """The rows of a group as they come, as long as there is time."""
    group = GROUPS[name]
    rows = group.measure(options)
    while time.monotonic() < stop:
        row = next(rows, None)
        if row is None:
            return
        print(group.shown(row), flush=True)
        yield row
    print(f"out of time: the rest of {name!r} is not measured", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    there = [n for n in (1, 2, 4, 8) if n <= len(jax.devices())]
    add("--groups", nargs="+", choices=GROUPS, default=[g for g in GROUPS if g not in IF_NAMED])
    add("--seconds", type=float, default=float("inf"), help="begin no measurement after them")
    add("--devices", type=int, nargs="+", default=there)
    add("--totals", type=int, nargs="+", help=f"of ideal and timeline; {attention.TOTALS}")
    add("--per-device", type=int, nargs="+", help=f"{attention.PER_DEVICE}, {training.PER_DEVICE}")
    add("--heads", type=heads_pair, nargs="+", help="16:16, of strategies 64:8 too")
    add("--ranks", type=int, nargs="+", default=attention.RANKS, help="of alone")
    add("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    add("--batches", type=int, default=9, help="of calls, whose median is taken")
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--fsdp-over-seq", action="store_true", help="split parameters, in training and trace")
    add("--gather", choices=get_args(Gather), default="layer", help="when they are whole, also")
    add("--states", choices=get_args(Exchange), default="all_gather", help="how TNL's move, also")
    add("--chunk", type=int, help="tokens that pass an MLP at once, in training and trace; 1024")
    add("--tries", type=int, default=8, help="of longest: lengths to run, a 64th apart")
    add("--memory", type=float, help="bytes of a device, where it does not say")
    add("--smoke", action="store_true", help="tiny models: does it run?")
    add("--xla", type=option, nargs="*", default=[], metavar="NAME=VALUE")
    add("--out", type=Path, default=RESULTS, help="folder for the results")
    add("--name", default="ring", help="that the results' files begin with")
    return parser.parse_args()


def option(text: str) -> tuple[str, str | bool]:
    """ "name=value" as ("name", "value"); XLA wants true and false as booleans."""
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False}.get(value, value)


if __name__ == "__main__":
    sys.exit(main())
