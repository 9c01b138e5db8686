"""Attention on 8 to 512 devices by the cost model: `python -m experiments.bench.ring.scaling`.

Nothing here is measured. Every row is what `longctx.parallel.explain` predicts of a forward and a
backward pass (bf16, causal, D 128, batch 1), and the share of the ideal, which is one device's
predicted time for the whole sequence divided by the devices. The assumptions are listed in
docs/guides/scaling.md. Times measured in the results files `MEASURED` stand beside their
predictions, with the commit of which they are: the model is of the code as it is now, but for
the share of the peak that an older forward kernel reached.

Writes results/ring_scaling.jsonl and draws a chart from it.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.bench.ring.parts import ALONE
from experiments.bench.ring.programs import ONE_DEVICE, PASSES, STRATEGIES, WIDTH, Case
from longctx.parallel import Layout, explain
from longctx.parallel.cost import cheapest
from longctx.parallel.cost_terms import Cost
from longctx.parallel.hardware import HARDWARE, Hardware, hardware_of
from longctx.provenance import read_rows, write_rows

RESULTS = Path(__file__).parents[1] / "results"
MEASURED = (
    "ring_pair_ideal",
    "ring_four_ideal",
    "ring_h200_ideal",
    "ring_h200_strategies",
    "ring_h200_alone",
    "ring_h200_pair_alone",
)
# From then on measured with the forward kernel of commit 3a1ef28; the share of the one before.
FASTER_FORWARD, SHARE_BEFORE = "2026-11-29", 0.63
CHIPS = ("H100", "TPU v5")
DEVICES = (8, 64, 512)
PER_DEVICE = tuple(2**n for n in range(10, 18))
HEADS = ((16, 16), (64, 8))


def case_of(row: Mapping[str, Any]) -> Case:
    """What a row of the benchmark was measured of."""
    return Case(*(row[field] for field in Case._fields))


def layout_of(case: Case, chip: Hardware) -> Layout:
    """As `case.layout`, but USP keeps its all-to-alls inside of a host where there are several."""
    if case.name == "usp" and case.devices > chip.island:
        return Layout("zigzag", case.devices // chip.island)
    return case.layout


def hardware_then(row: Mapping[str, Any]) -> Hardware | None:
    """What a row was measured on, as the model had it for the kernels of that day."""
    chip = hardware_of(row["device"])
    if chip is None or row["date"] >= FASTER_FORWARD:
        return chip
    return dataclasses.replace(chip, forward=SHARE_BEFORE)


def predicted(case: Case, chip: Hardware) -> Cost | None:
    """The cost of a case; None if its heads or layout do not allow the strategy."""
    costs = explain(
        batch=1, length=case.length, heads=case.heads, kv_heads=case.kv_heads, key_width=WIDTH,
        devices=case.devices, layout=layout_of(case, chip), hardware=chip,
    ).costs  # fmt: skip
    return next((cost for cost in costs if cost.strategy == case.name), None)


def picked(row: Mapping[str, Any]) -> str:
    """The strategy that "auto" takes today in the case of a row, each in its best layout."""
    case, chip = case_of(row), hardware_of(row["device"]) or HARDWARE["H100"]
    costs = (predicted(case._replace(name=name), chip) for name in STRATEGIES)
    return cheapest(cost for cost in costs if cost is not None).strategy


def ideal(case: Case, chip: Hardware) -> float:
    """Seconds of one device for an equal share of the whole sequence."""
    alone = predicted(case._replace(devices=1, name="ring"), chip)
    assert alone is not None, "one device needs no strategy"
    return alone.seconds / case.devices


def extrapolated() -> Iterator[dict[str, Any]]:
    """A row per chip, number of devices, heads, length and strategy."""
    for name, devices, (heads, kv_heads), local, strategy in itertools.product(
        CHIPS, DEVICES, HEADS, PER_DEVICE, STRATEGIES
    ):
        chip = HARDWARE[name]
        case = Case(local * devices, heads, kv_heads, PASSES[1], strategy, devices)
        cost = predicted(case, chip)
        if cost is not None:
            share = ideal(case, chip)
            yield {
                "kind": "predicted",
                "chip": chip.name,
                **case._asdict(),
                "per_device": local,
                "ms": 1e3 * cost.seconds,
                "ideal_ms": 1e3 * share,
                "of_ideal": share / cost.seconds,
                "sent_bytes": cost.forward_bytes + cost.backward_bytes,
                "assumed": dataclasses.asdict(chip),
            }


def beside_measured(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measured times of the benchmark, each with its prediction.

    Of what is timed alone the ring only: of others' moves it has copies that the model knows not.
    """
    for row in rows:
        chip, case = hardware_then(row), case_of(row)
        if chip is None or "ms" not in row or case.part not in ("full", ALONE):
            continue
        if case.part == ALONE:
            if case.name != "ring":
                continue
            chip = dataclasses.replace(chip, permute=math.inf, between=math.inf, latency=0.0)
        each = case._replace(name="ring", devices=1)  # of what one device can run, on one or all
        cost = predicted(each if case.name in ONE_DEVICE else case, chip)
        if cost is not None and case.name != "cudnn":
            seconds = cost.forward_seconds if case.which == PASSES[0] else cost.seconds
            both = {"ms": 1e3 * seconds, "measured_ms": row["ms"], "measured_at": row["commit"]}
            yield {"kind": "beside measured", "chip": chip.name, **case._asdict(), **both}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of the ideal by tokens per device: a row per chip, a column per number of devices."""
    rows = [row for row in rows if row["kind"] == "predicted"]
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    figure = Figure(figsize=(12, 3.4 * len(chips)), layout="constrained")
    grid = figure.subplots(len(chips), len(DEVICES), sharex=True, sharey=True, squeeze=False)
    for (chip, devices), axes in zip(itertools.product(chips, DEVICES), grid.flat, strict=True):
        for i, strategy in enumerate(STRATEGIES):
            for (heads, kv_heads), style in zip(HEADS, ("--", "-"), strict=True):
                line = [
                    (r["per_device"], r["of_ideal"])
                    for r in rows
                    if (r["chip"], r["devices"], r["name"]) == (chip, devices, strategy)
                    and (r["heads"], r["kv_heads"]) == (heads, kv_heads)
                ]
                if line:
                    label = f"{strategy}, {heads}:{kv_heads}"
                    axes.plot(*zip(*line, strict=True), style, color=f"C{i}", label=label)
        axes.set(title=f"{devices} x {chip}", ylim=(0, 1.05))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of ideal")
    for axes in grid[-1]:
        axes.set_xlabel("tokens per device")
    lines, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", title="heads")
    figure.suptitle("predicted, not measured: forward + backward of causal attention")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Write the rows and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    rows, path = list(extrapolated()), options.out / "ring_scaling.jsonl"
    for measured in (RESULTS / f"{name}.jsonl" for name in MEASURED):
        if measured.exists():
            rows += beside_measured(read_rows(measured))
    write_rows(path, rows)
    draw(read_rows(path), path.with_suffix(".png"))
    for row in rows:
        where = f"{row['devices']:4} x {row['chip']:8} {row['heads']}:{row['kv_heads']}"
        each = f"{row['length'] // row['devices']:7} tokens each {row['name']:10}"
        said = f"{row['of_ideal']:6.1%}" if "of_ideal" in row else f"{row['measured_ms']:9.3f} ms"
        print(f"{where:24} {each} {row['ms']:12.3f} ms predicted {said}")


if __name__ == "__main__":
    main()
