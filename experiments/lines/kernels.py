"""Rows of one operator on one device."""

import itertools
import math
from collections.abc import Iterator, Sequence

from experiments.bench._lightning_report import by_heads
from experiments.lines.line import Line, Reader, Row, compare_ms
from experiments.transnormer.lightning_generations import ns_per_token, published

# Operators whose times stand in the README too.
HEADLINES = ("hash nb=16", "drop 0.5", "mixed radix, bias and RoPE")


def lightning(rows: Sequence[Row]) -> Iterator[Line]:
    """Kernel times against flash-linear-attention and the byte floor; shares of the floor."""
    shapes = [r for r in rows if r["group"] == "shapes" and "forward_ms" in r]
    for ours in (r for r in shapes if r["implementation"] == "ours"):
        where = f"{ours['batch']} x {ours['length']}"
        same = {
            r["implementation"]: r
            for r in shapes
            if (r["batch"], r["length"]) == (ours["batch"], ours["length"])
        }
        fla = same["fla chunk_simple_gla"]
        for key, name in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
            headline = key == "both_ms"
            yield compare_ms(f"{name}, {where}", fla, ours, key, "fla chunk_simple_gla", headline)
        floor = {"forward_ms": ours["forward_floor_ms"]}
        yield compare_ms(f"forward, {where}", floor, ours, "forward_ms", "byte floor")


def checked(rows: Sequence[Row]) -> Iterator[Line]:
    """How many checks of every dtype are right, and their worst errors."""
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        some = [r for r in rows if r["dtype"] == dtype]
        right = sum(r["right"] for r in some)
        worst = [
            max((r[key] for r in some if r.get(key) is not None), default=math.nan)
            for key in ("error", "gradient_error")
        ]
        yield Line(
            f"{len(some)} checks against definitions in float64, {dtype}",
            f"relative errors of at most {some[0]['tolerance']:g}",
            "",
            f"{right} right; worst {worst[0]:.1e}, of gradients {worst[1]:.1e}",
        )


def lightning_lengths(rows: Sequence[Row]) -> Iterator[Line]:
    """Time per token at fixed batch and heads, as the length grows."""
    for heads, (first, *longer) in by_heads(rows).items():
        for r, (key, name) in itertools.product(
            longer, (("forward", "forward"), ("both", "forward + backward"))
        ):
            what = f"time per token, {name}, {heads} heads in all, {r['length']} tokens"
            beside = f"the same at {first['length']}"
            theirs, ours = (x.get(f"{key}_ns_per_token") for x in (first, r))
            if ours is None:
                yield Line(what, beside, "", f"not measured: {r['absent']}")
                continue
            shown = (f"{theirs:.1f} ns", f"{ours:.1f} ns")
            yield Line(what, beside, *shown, ours / theirs)


def lightning_generations(rows: Sequence[Row]) -> Iterator[Line]:
    """Growth of the time per token with the length; LA2 beside the others, and as published."""
    first, *_, last = sorted({r["length"] for r in rows})
    at = {(r["operator"], r["length"]): r for r in rows}
    for name in dict.fromkeys(r["operator"] for r in rows):
        before, after = (ns_per_token(at[name, length]) for length in (first, last))
        what = f"{name}, forward + backward, time per token, {last} tokens"
        shown = (f"{before:.1f} ns", f"{after:.1f} ns")
        yield Line(what, f"the same at {first}", *shown, after / before)
    for (name, length), r in at.items():
        ours, what = at["LA2", length], f"LA2, forward + backward, {r['batch']} x {length}"
        if name != "LA2":
            yield compare_ms(what, r, ours, "forward_backward_ms", name)
        elif known := published(r):
            theirs = {"forward_backward_ms": sum(known)}
            yield compare_ms(what, theirs, ours, "forward_backward_ms", "published, on another GPU")


def flash(rows: Sequence[Row]) -> Iterator[Line]:
    """Kernel times against cuDNN's, through jax.nn, in the same process."""
    shape = ("batch", "length", "heads", "kv_heads", "width", "window", "document")
    timed = [r for r in rows if "forward_ms" in r]
    longest = max((r["length"] for r in timed if r["group"] == "dense"), default=0)
    rivals = {tuple(r[n] for n in shape): r for r in timed if r["implementation"] == "cudnn"}
    for ours in (r for r in timed if r["implementation"] == "ours"):
        rival = rivals.get(tuple(ours[n] for n in shape))
        if rival is None:
            continue
        grouped = ours["heads"] != ours["kv_heads"]
        heads = f", heads {ours['heads']}:{ours['kv_heads']}" if grouped else ""
        window = f", window {ours['window']}" if ours["window"] else ""
        where = f"D {ours['width']}, {ours['batch']} x {ours['length']}{heads}{window}"
        for key, name in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
            told = ours["group"] == "dense" and ours["length"] == longest
            headline = told and key == "both_ms"
            yield compare_ms(f"{name}, {where}", rival, ours, key, "cuDNN", headline)


def by_operator(rival: str, *names: str) -> Reader:
    """Reader of files that have a row per operator and length: those in `names` against `rival`."""

    def lines(rows: Sequence[Row]) -> Iterator[Line]:
        rivals = {r["length"]: r for r in rows if r["operator"] == rival}
        for ours in rows:
            if not ours["operator"].startswith(names) or ours["length"] not in rivals:
                continue
            for key in ("forward_ms", "forward_backward_ms", "ms"):
                if ours.get(key) is None:
                    continue
                name = "forward" if key == "forward_ms" else "forward + backward"
                what = f"{ours['operator']}, {name}, {ours.get('batch', 1)} x {ours['length']}"
                headline = key == "forward_backward_ms" and ours["operator"] in HEADLINES
                yield compare_ms(what, rivals[ours["length"]], ours, key, rival, headline)

    return lines


def coverage(rows: Sequence[Row]) -> Iterator[Line]:
    """Share of the pairs that a method ought to compute and does."""
    rivals = {"chunks": "chunks of 64", "mean_chunks": "chunks of length / buckets"}
    for r in rows:
        for key, name in rivals.items():
            what = f"pairs computed, {r['buckets']} buckets, {r['length']} tokens"
            yield Line(what, f"Reformer's {name}", f"{r[key]:.3f}", f"{r['hash']:.3f}")


def tiles(rows: Sequence[Row]) -> Iterator[Line]:
    """Tiles that intervals visit, beside those of the released kernels."""
    for r in rows:
        theirs, ours = r["released"], r["intervals"]
        what = f"tiles a head visits, {r['operator']}, {r['length']} tokens"
        yield Line(what, "the released bounds", f"{theirs:.0f}", f"{ours:.0f}", ours / theirs)
