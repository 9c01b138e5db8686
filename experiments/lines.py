"""How committed rows are read as comparisons: one function per kind of results file."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.bench._claims import Claim
from experiments.bench._lightning_report import by_heads
from experiments.hybrids.recall import accuracy
from experiments.ring_attention.max_context import PAPER as MAX_CONTEXT
from experiments.ring_attention.max_context import longest
from experiments.transnormer.lightning_generations import ns_per_token, published
from experiments.transnormer.wikitext103 import PAPER_PERPLEXITY as WIKITEXT103
from longctx.reproduce.ablation import compare

# Operators whose times stand in the README too.
HEADLINES = ("hash nb=16", "drop 0.5", "mixed radix, bias and RoPE")

type Row = dict[str, Any]
type Reader = Callable[[Sequence[Row]], Iterator[Line]]


class Line(NamedTuple):
    """One measured comparison: what, beside what, their number and ours.

    The ratio is ours over theirs; None where a ratio means nothing (losses).
    """

    what: str
    beside: str
    theirs: str
    ours: str
    ratio: float | None = None
    headline: bool = False  # stands in the README too


def _ms(what: str, rival: Row, ours: Row, key: str, name: str, headline: bool = False) -> Line:
    theirs, mine = rival[key], ours[key]
    return Line(what, name, f"{theirs:.3f} ms", f"{mine:.3f} ms", mine / theirs, headline)


def _speed(what: str, name: str, theirs: float, ours: float, headline: bool = False) -> Line:
    shown = (f"{theirs:,.0f} tokens/s", f"{ours:,.0f} tokens/s")
    return Line(what, name, *shown, ours / theirs, headline)


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
            yield _ms(f"{name}, {where}", fla, ours, key, "fla chunk_simple_gla", headline)
        floor = {"forward_ms": ours["forward_floor_ms"]}
        yield _ms(f"forward, {where}", floor, ours, "forward_ms", "byte floor")


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
            yield Line(what, beside, *shown, ours / theirs, headline=r["platform"] == "cpu")


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
            yield _ms(what, r, ours, "forward_backward_ms", name)
        elif known := published(r):
            theirs = {"forward_backward_ms": sum(known)}
            yield _ms(what, theirs, ours, "forward_backward_ms", "published, on another GPU")


def flash(rows: Sequence[Row]) -> Iterator[Line]:
    """Kernel times against cuDNN's, through jax.nn, in the same process."""
    shape = ("batch", "length", "heads", "kv_heads", "width", "window", "document")
    timed = [r for r in rows if "forward_ms" in r]
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
            headline = ours["group"] == "dense" and key == "both_ms"
            yield _ms(f"{name}, {where}", rival, ours, key, "cuDNN", headline)


def judged(reader: Reader, claims: Callable[[Sequence[Row]], Iterator[Claim]]) -> Reader:
    """What `reader` reads, and those claims of the benchmark that were measured."""

    def lines(rows: Sequence[Row]) -> Iterator[Line]:
        yield from reader(rows)
        for claim in claims(rows):
            if claim.ratio is not None:
                yield Line(claim.what, claim.rule, "", f"{claim.ratio:.3g}, {claim.verdict}")

    return lines


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
                yield _ms(what, rivals[ours["length"]], ours, key, rival, headline)

    return lines


def ring(rows: Sequence[Row]) -> Iterator[Line]:
    """Strategies over devices against an equal share of one device; their errors, hidden moves."""
    exact = {_shape(r): r["errors"] for r in rows if r["name"] == "ours" and "errors" in r}
    for r in rows:
        if "of_ideal" in r:
            ideal = {"ms": r["ideal_ms"]}
            headline = r["group"] == "ideal"
            yield _ms(_sharded(r), ideal, r, "ms", f"1/{r['devices']} of one device", headline)
        if "errors" in r and r["devices"] > 1:
            ours, one = (max(e.values()) for e in (r["errors"], exact[_shape(r)]))
            what = f"{_sharded(r)}: error against float64"
            yield Line(what, "one device", f"{one:.2e}", f"{ours:.2e}", ours / one)
        if "overlap" in r:
            shown = ("all of it", f"{r['overlap']:.1%}")
            yield Line(f"{_sharded(r)}: hidden communication", "", *shown, r["overlap"])


def strategies(rows: Sequence[Row]) -> Iterator[Line]:
    """As `ring`, and what "auto" picks beside the fastest."""
    yield from ring(rows)
    shapes: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if "of_ideal" in r:
            shapes.setdefault((r["devices"], *_shape(r)), []).append(r)
    for same in shapes.values():
        best = min(same, key=lambda r: r["ms"])
        auto = next((r for r in same if r["name"] == r["auto"]), None)
        if auto is not None:
            what = f'"auto" takes {_sharded(auto)}'
            yield _ms(what, best, auto, "ms", f"the fastest, {best['name']}")


def ring_training(rows: Sequence[Row]) -> Iterator[Line]:
    """Training over devices beside one device."""
    for r in rows:
        if r["devices"] > 1 and "failed" not in r:
            ours = r["tokens_per_second_per_device"]
            what = f"training {r['model']}, {r['devices']} devices, {r['per_device']} tokens each"
            yield _speed(f"{what}: per device", "one device", ours / r["of_first"], ours, True)


def ring_longest(rows: Sequence[Row]) -> Iterator[Line]:
    """Longest sequences over devices beside one device's."""
    for r in rows:
        if r["devices"] > 1:
            first = r["per_device"] / r["of_first"]
            memory = f"{r['memory_bytes'] / 1e9:.0f} GB each"
            what = f"longest sequence that trains, {r['model']}, {r['devices']} devices, {memory}"
            shown = (f"{first:,.0f} tokens", f"{r['length']:,} tokens")
            yield Line(what, "one device", *shown, r["length"] / first, r["ran"])


def ring_methods(rows: Sequence[Row]) -> Iterator[Line]:
    """The longest sequence of every method beside that of the method before it."""
    before: Row | None = None
    for r in rows:
        what = f"longest sequence that trains, {r['method']}, {r['devices']} devices"
        what += f" of {r['memory_bytes'] / 1e9:.0f} GB"
        if not r["ran"]:
            yield Line(what, "", "", f"not measured: {r['failed']}")
            continue
        ours = f"{'at least ' if r['longer_may_fit'] else ''}{r['length']:,} tokens"
        if before is None or before["devices"] != r["devices"]:
            yield Line(what, "", "", ours)
        else:
            theirs = f"{before['length']:,} tokens"
            yield Line(what, before["method"], theirs, ours, r["length"] / before["length"])
        before = r


def _shape(r: Row) -> tuple[Any, ...]:
    return r["length"], r["heads"], r["kv_heads"], r["which"]


def _sharded(r: Row) -> str:
    """A program over devices, in words."""
    each = f"{r['devices']} x {r['length'] // r['devices']} tokens"
    which = r["which"].replace("_", " + ")
    return f"{r['name']}, {which}, {each}, heads {r['heads']}:{r['kv_heads']}"


def schedule(rows: Sequence[Row]) -> Iterator[Line]:
    """Of programs that were only compiled: what they move, what of it is exposed, and memory."""
    fewest = min(r["devices"] for r in rows)

    def kind(r: Row) -> tuple[Any, ...]:
        return r["name"], r["length"] // r["devices"], *_shape(r)[1:]

    same = {kind(r): r for r in rows if r["devices"] == fewest}
    for r in rows:
        moves = r["moves"].values()
        moved, exposed = (sum(move[x] for move in moves) for x in ("bytes", "exposed_bytes"))
        what, shown = _sharded(r), (f"{moved / 1e6:,.0f} MB", f"{exposed / 1e6:,.0f} MB")
        yield Line(f"{what}: moves that nothing hides", "all moves", *shown, exposed / moved)
        first = same.get(kind(r))
        if first is not None and first is not r:
            before, after = (x["temporary_bytes"] for x in (first, r))
            shown = (f"{before / 1e6:,.0f} MB", f"{after / 1e6:,.0f} MB")
            beside = f"{fewest} devices, as long each"
            yield Line(f"{what}: temporary memory", beside, *shown, after / before)


def extrapolated(rows: Sequence[Row]) -> Iterator[Line]:
    """Predictions of the cost model at 32768 tokens a device, and beside what was measured."""
    for r in rows:
        if r["kind"] == "beside measured":
            measured = {"ms": r["measured_ms"]}
            yield _ms(f"{_sharded(r)}, predicted", measured, r, "ms", "measured")
        elif r["per_device"] == 32768 and r["kv_heads"] == 8 and r["name"] in ("ring", "usp"):
            ideal, what = {"ms": r["ideal_ms"]}, f"{r['chip']}: {_sharded(r)}"
            yield _ms(what, ideal, r, "ms", f"1/{r['devices']} of one device, predicted too")


def training_speed(rows: Sequence[Row]) -> Iterator[Line]:
    """Tokens per second of whole training steps: flat in the length, and beside others'."""
    rows = [r for r in rows if "failed" not in r]
    speed = {(r["model"], r["length"]): r["tokens_per_second"] for r in rows}
    first, *_ = lengths = sorted({r["length"] for r in rows})
    paper = {r["length"]: r["paper"] for r in rows if r["model"] == "TNL"}
    for length in lengths:
        ours, what = speed["TNL", length], f"training, 385M, sequences of {length}"
        if length > first:
            yield _speed(what, f"the same at {first}", speed["TNL", first], ours, True)
        if paper[length]:
            yield _speed(what, "the paper's, one of two A100", paper[length], ours)
        if ("Transformer", length) in speed:
            other = speed["Transformer", length]
            yield _speed(what, "our softmax Transformer", other, ours, True)


def ablation(rows: Sequence[Row]) -> Iterator[Line]:
    """Differences from the base arm, ours in bits per byte; a ratio of them means nothing."""
    sources = {r["arm"]: r["source"] for r in rows}
    # Of rows for several lengths, those at the trained one.
    rows = [r for r in rows if r.get("length") == r.get("trained")]
    for result in compare(rows):
        if not result.is_base:
            paper = "" if result.paper_difference is None else f"{result.paper_difference:+.3f}"
            what = f"{result.arm} against {rows[0]['base']}"
            yield Line(what, sources[result.arm], paper, result.verdict)


def recall(rows: Sequence[Row]) -> Iterator[Line]:
    """Shares of right answers, every arm beside the base arm of the same task and seed."""
    base = {(r["task"], r["seed"]): r for r in rows if r["arm"] == r["base"]}
    for r in rows:
        if r["arm"] != r["base"] and (r["task"], r["seed"]) in base:
            what = f"{r['task']}, {r['length']} tokens: {r['arm']}"
            theirs = base[r["task"], r["seed"]]
            yield Line(what, r["base"], f"{theirs['accuracy']:.3f}", f"{r['accuracy']:.3f}")


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


def wikitext103(rows: Sequence[Row]) -> Iterator[Line]:
    """Perplexities beside the paper's."""
    for r in rows:
        for part, paper in WIKITEXT103[r["arm"]].items():
            what = f"{r['arm']}, perplexity, {part}, {r['tokens'] / 1e6:,.0f}M tokens"
            yield Line(what, r["source"], f"{paper:.2f}", f"{r[f'{part}_perplexity']:.2f}")


def hybrids(rows: Sequence[Row]) -> Iterator[Line]:
    """Accuracy at the trained length (of needles: over depths), and the speed of training."""
    fastest = max(r["tokens_per_second"] or 0.0 for r in rows)
    for arm, task in dict.fromkeys((r["arm"], r["task"]) for r in rows):
        ours = [r for r in rows if (r["arm"], r["task"]) == (arm, task)]
        trained = ours[0]["trained"]
        what = f"{arm}, {task} accuracy at {trained} tokens"
        if ours[0]["tokens_per_second"]:
            share = ours[0]["tokens_per_second"] / fastest
            what += f", {share:.0%} of the fastest one's tokens/s"
        paper = ours[0]["paper"] and f"{ours[0]['paper']} (per cent)"
        beside = (
            "MiniMax-01, needles, 1B" if task == "needle" else f"chance {ours[0]['chance']:.3f}"
        )
        shown = f"{accuracy(ours, task, trained):.3f}"
        yield Line(what, beside, paper if task == "needle" else "", shown)


def decoding(rows: Sequence[Row]) -> Iterator[Line]:
    """Speed and memory after each model's longest context; TNL against softmax attention."""
    rows = [r for r in rows if r["tokens_per_second"] is not None]
    at = {(r["model"], r["context"]): r for r in rows}
    contexts = {name: sorted(c for n, c in at if n == name) for name in ("TNL", "Transformer")}
    for model, (first, *_, last) in contexts.items():
        ours, beside = at[model, last], at[model, first]
        what = f"{model}, {ours['parameters'] / 1e6:.0f}M, decoding after {last} tokens"
        speeds = (beside["tokens_per_second"], ours["tokens_per_second"])
        yield _speed(what, f"after {first}", *speeds, headline=model == "TNL")
        there, here = (f"{r['row_bytes'] / 1e6:,.1f} MB" for r in (beside, ours))
        ratio = ours["row_bytes"] / beside["row_bytes"]
        yield Line(f"{what}, cache per row", f"after {first}", there, here, ratio)
    last = max(set(contexts["TNL"]) & set(contexts["Transformer"]))
    speeds = (at["Transformer", last]["tokens_per_second"], at["TNL", last]["tokens_per_second"])
    yield _speed(f"decoding after {last} tokens", "our softmax Transformer", *speeds)


def max_context(rows: Sequence[Row]) -> Iterator[Line]:
    """Longest contexts that the compiler says fit, beside the paper's; memory, hence a ratio."""
    for r in longest(rows):
        paper = MAX_CONTEXT.get(r["topology"], {}).get(r["method"])
        what = f"7B, {r['method']} on {r['topology']}, a sequence on {r['seq']} (analysis)"
        theirs = f"{paper}K tokens" if paper else ""
        ratio = r["length"] / (paper * 1024) if paper else None
        yield Line(what, "the paper's table 3", theirs, f"{r['length'] // 1024}K tokens", ratio)


def plans(rows: Sequence[Row]) -> Iterator[Line]:
    """What the compiler says a training step needs of one device, beside what the device has."""
    for r in rows:
        what = f"{r['name']}, {r['topology']}"
        if "refused" in r:
            yield Line(f"{what}: memory", "of the device", "", "refused: out of memory")
            continue
        memory = r["bytes_per_device"]
        there, needed = (f"{memory[key] / 1e9:.1f} GB" for key in ("available", "all"))
        ratio = memory["all"] / memory["available"]
        yield Line(f"{what}: memory", "of the device", there, needed, ratio)
        moved, exposed = (
            sum(c[key] for c in r["collectives"]) / 1e9 for key in ("bytes", "exposed_bytes")
        )
        shown = (f"{moved:.1f} GB", f"{exposed:.1f} GB")
        yield Line(f"{what}: moved while nothing is computed", "all moves", *shown, exposed / moved)
