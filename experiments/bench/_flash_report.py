"""The flash benchmark's rows as a table, a plot, and a judgement."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench._claims import Claim, over
from experiments.bench._flash_peers import Shape

type Row = dict[str, Any]

TIMES = ("forward_ms", "both_ms")
WINDOW, PACKED = Shape(1, 131072, window=4096), Shape(1, 65536, document=2048)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with each time over cuDNN's of the same shape."""
    lines = [
        "| group | D, B x T, H/K | implementation | forward ms (TFLOP/s) | fwd+bwd ms "
        "| bwd TFLOP/s | over cuDNN's | errors o, dq, dk, dv |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['group']} | {where(row)} | {row['implementation']} "
        if "absent" in row:
            lines.append(f"{start}| absent: {row['absent']} | | | | |")
            continue
        if "errors" in row:
            found = " ".join(f"{x:.2e}" for x in row["errors"].values())
            lines.append(f"{start}| | | | | {found} |")
            continue
        ratios = [over(row[n], _value(rows, _shape(row), "cudnn", n)) for n in TIMES]
        ratio = " / ".join(f"{x:.2f}" for x in ratios if x is not None)
        lines.append(
            f"{start}| {row['forward_ms']:.3f} ({row['forward_tflops']:.0f}) "
            f"| {row['both_ms']:.3f} | {row['backward_tflops']:.0f} | {ratio} | |"
        )
    return "\n".join(lines)


def where(row: Row) -> str:
    """The shape of a row in words."""
    extra = "".join(f", {n} {row[n]}" for n in ("window", "document") if row[n])
    heads = f"{row['heads']}/{row['kv_heads']}"
    return f"{row['width']}, {row['batch']} x {row['length']}, {heads}{extra}"


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """What the kernels must show on an H100."""

    def value(shape: Shape, name: str, key: str) -> float | None:
        return _value(rows, shape, name, key)

    def best(shape: Shape, names: Sequence[str], key: str, choose: Any) -> tuple[str, Any]:
        """Which of these peers were measured, and the best of what they reached."""
        found = {n: x for n in names if (x := value(shape, n, key)) is not None}
        return " and ".join(found) or " and ".join(names), choose(found.values(), default=None)

    for width in (128, 64):
        for batch, length in ((4, 8192), (1, 32768)):
            shape = Shape(batch, length, width=width)
            at = f"D {width}, {batch} x {length}"
            names, forward = best(shape, ("cudnn", "tokamax"), "forward_ms", min)
            ratio = over(value(shape, "ours", "forward_ms"), forward)
            yield Claim(f"forward over the best of {names}, {at}", ratio, 1.03)
            ratio = over(value(shape, "ours", "both_ms"), value(shape, "cudnn", "both_ms"))
            yield Claim(f"forward + backward over cuDNN, {at}", ratio, 1.05)
    wide, rivals = Shape(4, 8192, width=256), ("tokamax", "tokamax triton", "jax triton")
    names, rate = best(wide, rivals, "backward_tflops", max)
    ratio = over(value(wide, "ours", "backward_tflops"), rate)
    yield Claim(f"D 256 backward TFLOP/s over the best of {names}", ratio, 1.5, True)
    for what, slow, fast, bound, at_least in (
        ("dense over window 4096 at 131072", Shape(1, 131072), WINDOW, 12, True),
        ("packed 2K documents over the same as a batch", PACKED, Shape(32, 2048), 1.3, False),
    ):
        ratio = over(value(slow, "ours", "both_ms"), value(fast, "ours", "both_ms"))
        yield Claim(f"{what}, forward + backward", ratio, bound, at_least)
    for row in rows:
        if "errors" in row and row["implementation"] == "ours":
            theirs = next(
                (
                    r["errors"]
                    for r in rows
                    if _shape(r) == _shape(row) and r["implementation"] == "cudnn" and "errors" in r
                ),
                None,
            )
            worst = theirs and max(row["errors"][n] / theirs[n] for n in theirs)
            yield Claim(f"worst error over cuDNN's, D {where(row)}", worst, 1.1)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Rates of the dense shapes, forward and backward."""
    rows = [row for row in rows if row["group"] == "dense" and "both_ms" in row]
    if not rows:
        return
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)

    def label(row: Row) -> str:
        return f"D {row['width']}\n{row['batch']} x {row['length']}"

    labels = list(dict.fromkeys(label(row) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for panel, which in zip(panels, ("forward", "backward"), strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if row["implementation"] == name]
            width = 0.8 / len(names)
            at = np.array([labels.index(label(row)) for row in mine])
            heights = [row[f"{which}_tflops"] for row in mine]
            panel.bar(at + (i - (len(names) - 1) / 2) * width, heights, width, label=name)
        panel.set_xticks(range(len(labels)), labels, fontsize=7)
        panel.set_title(f"causal {which}, bfloat16", fontsize=9)
    panels[0].set_ylabel("TFLOP/s")
    handles, names = panels[0].get_legend_handles_labels()
    options = {"loc": "outside lower center", "ncols": len(names), "frameon": False}
    figure.legend(handles, names, fontsize=8, **options)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def _shape(row: Row) -> Shape:
    return Shape(**{name: row[name] for name in Shape._fields})


def _value(rows: Sequence[Row], shape: Shape, name: str, key: str) -> float | None:
    """What `name` reached at `shape`, if it was measured."""
    return next(
        (r[key] for r in rows if key in r and r["implementation"] == name and _shape(r) == shape),
        None,
    )
