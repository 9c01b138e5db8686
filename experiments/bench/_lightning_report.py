"""The lightning benchmark's rows as a table, a plot, and a judgement."""

import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench._claims import Claim, over
from longctx.figures import length_axis, tidy

type Row = dict[str, Any]

LENGTHS = ("lengths", "full")  # groups
# From which length times per token may differ by so much: on an H100, and on a CPU in float32.
FLAT = {"bfloat16": (16384, 1.05), "float32": (1024, 1.15)}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with each time over that of fla's chunk_simple_gla."""
    lines = [
        "| group | B x T, H | implementation | forward ms (of floor) | fwd+bwd ms "
        "| both over fla's | worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    rival = {
        (row["group"], row["batch"], row["length"]): row
        for row in rows
        if row["implementation"] == "fla chunk_simple_gla" and "forward_ms" in row
    }
    for row in rows:
        where = f"{row['group']} | {row['batch']} x {row['length']}, {row['heads']}"
        if "both_ms" not in row:
            forward = f"{row['forward_ms']:.3f}" if "forward_ms" in row else ""
            reason = f"absent: {row['absent']}"
            lines.append(f"| {where} | {row['implementation']} | {forward} | {reason} | | |")
            continue
        fla = rival.get((row["group"], row["batch"], row["length"]))
        ratio = fla and " / ".join(f"{row[n] / fla[n]:.2f}" for n in ("forward_ms", "both_ms"))
        worst = max(row["errors"].values()) if "errors" in row else None
        lines.append(
            f"| {where} | {row['implementation']} "
            f"| {row['forward_ms']:.3f} ({row['forward_of_floor']:.0%}) | {row['both_ms']:.3f} "
            f"| {ratio or ''} | {'' if worst is None else f'{worst:.1e}'} |"
        )
    return "\n".join(lines)


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """What the kernels must show on an H100; and the chunked loop, over lengths, on a CPU."""
    found: dict[tuple[Any, ...], Row] = {}
    for r in rows:  # what several groups have counts where it comes first
        if "both_ms" in r:
            where = (r["batch"], r["length"], r["heads"], r["decays"], r["implementation"])
            found.setdefault(where, r)

    def value(key: str, batch: int, length: int, name: str = "ours") -> Any:
        return found.get((batch, length, 16, True, name), {}).get(key)

    rival = "fla chunk_simple_gla"
    for shape, bound in (
        ((16, 2048), 0.45),
        ((4, 8192), 0.5),
        ((1, 32768), 0.35),
        ((1, 131072), 0.35),
    ):
        where = f"{shape[0]} x {shape[1]}"
        for key, most in (("forward_ms", bound), ("both_ms", 0.42)):
            ratio = over(value(key, *shape), value(key, *shape, rival))
            yield Claim(f"{key.removesuffix('_ms')} over fla's, {where}", ratio, most)
        ours, theirs = value("errors", *shape), value("errors", *shape, rival)
        worst = ours and max(ours.values())
        yield Claim(f"worst relative error, {where}", worst, 5e-3)
        worst = ours and theirs and max(ours[n] / theirs[n] for n in theirs)
        yield Claim(f"worst error over fla's, {where}", worst, 1.001)
    share = value("forward_of_floor", 16, 2048)
    yield Claim("forward, share of the byte floor on a full chip", share, 0.85, at_least=True)
    # Heads alone differ in their own group, whose rows are measured one right after another.
    heads = {r["batch"]: r for r in rows if r["group"] == "heads" and r["implementation"] == "ours"}
    for key, name in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
        few, full = (heads.get(batch, {}).get(key) for batch in (1, 16))
        what = f"{name}, 16 heads in all over a full chip, 32768 tokens"
        yield Claim(what, over(few, full), 1.5)
    yield from _flatness(by_heads(rows))


def by_heads(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The rows of `LENGTHS` that were timed, from short to long, by heads in all."""
    found: dict[int, list[Row]] = {}
    for r in sorted(rows, key=lambda r: (r["batch"] * r["heads"], r["length"])):
        if r["group"] in LENGTHS and "forward_ms" in r:
            found.setdefault(r["batch"] * r["heads"], []).append(r)
    return found


def _flatness(rows: Mapping[int, Sequence[Row]]) -> Iterator[Claim]:
    """The slowest over the fastest time per token, for each number of heads."""
    what = "largest over smallest time per token"
    if not rows:
        yield Claim(what, None, FLAT["bfloat16"][1])
    for heads, (key, name) in itertools.product(
        rows, (("forward", "forward"), ("both", "forward + backward"))
    ):
        least, bound = FLAT[rows[heads][0]["dtype"]]
        times = {r["length"]: r.get(f"{key}_ns_per_token") for r in rows[heads]}
        times = {n: time for n, time in times.items() if time is not None and n >= least}
        if len(times) > 1:
            where = f"{name}, {least} to {max(times)} tokens, {heads} heads in all"
            yield Claim(f"{what}, {where}", max(times.values()) / min(times.values()), bound)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time per token against length, from the groups `LENGTHS`."""
    lines = by_heads(rows)
    if not lines:
        return
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    for colour, (heads, measured) in enumerate(lines.items()):
        for key, name, style in (("forward", "forward", "o-"), ("both", "with backward", "o--")):
            timed = [r for r in measured if f"{key}_ms" in r]
            points = [(r["length"], r[f"{key}_ns_per_token"]) for r in timed]
            label = f"{heads} heads in all, {name}"
            axes.plot(*np.transpose(points), style, color=f"C{colour}", label=label)
    lengths = {row["length"] for measured in lines.values() for row in measured}
    length_axis(axes, sorted(lengths), "length, tokens")
    tidy(axes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ns per token")
    first = next(iter(lines.values()))[0]
    axes.set_title(f"heads of {first['width']}, {first['dtype']}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=150)
