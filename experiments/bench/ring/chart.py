"""Which strategy wins where: the share of the ideal by tokens per device."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.bench.ring.programs import PASSES, WIDTH
from experiments.bench.ring.scaling import picked
from longctx.figures import length_axis, tidy


def draw_chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per pass, heads and number of devices; rings mark what "auto" picks today."""
    rows = [row for row in rows if "of_ideal" in row]
    shapes = sorted({(r["devices"], r["heads"], r["kv_heads"]) for r in rows})
    figure = Figure(figsize=(11, 3.4 * len(shapes)), layout="constrained")
    grid = figure.subplots(len(shapes), len(PASSES), sharex=True, sharey=True, squeeze=False)
    for (shape, which), axes in zip(itertools.product(shapes, PASSES), grid.flat, strict=True):
        here = [
            r
            for r in rows
            if r["which"] == which and (r["devices"], r["heads"], r["kv_heads"]) == shape
        ]
        for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            line = sorted(
                (r["length"] // r["devices"], r["of_ideal"]) for r in here if r["name"] == name
            )
            if line:
                axes.plot(*zip(*line, strict=True), "o-", color=f"C{i}", label=name)
        auto = [r for r in here if r["name"] == picked(r)]
        x, y = [r["length"] // r["devices"] for r in auto], [r["of_ideal"] for r in auto]
        axes.plot(x, y, "o", markersize=12, mfc="none", color="black", label="auto")
        devices, heads, kv_heads = shape
        axes.set(title=f"{which.replace('_', ' + ')}, {devices} devices, {heads}:{kv_heads}")
        axes.set(ylim=(0, 1.1))
        axes.axhline(0.95, color="grey", linewidth=0.5)
        length_axis(axes, sorted({r["length"] // r["devices"] for r in rows}), "")
        tidy(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of ideal")
    for axes in grid[-1]:
        axes.set_xlabel("tokens per device")
    named: dict[str, Any] = {}  # over all panels: two devices have no USP
    for axes in grid.flat:
        lines, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, lines, strict=True))
    named["auto"] = named.pop("auto")  # the last of them
    figure.legend(named.values(), named, loc="outside right upper")
    figure.suptitle(f"causal attention on {rows[0]['device']}, D = {WIDTH}")
    figure.savefig(path, dpi=150)
