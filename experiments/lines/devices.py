"""Rows of several devices, measured, compiled or predicted."""

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.bench.ring.parts import ALONE
from experiments.bench.ring.scaling import case_of, picked
from experiments.lines.line import Line, Row, compare_ms, compare_speed
from experiments.ring_attention.max_context import PAPER as MAX_CONTEXT
from experiments.ring_attention.max_context import longest


def ring(rows: Sequence[Row]) -> Iterator[Line]:
    """Strategies over devices against an equal share of one device; their errors, hidden moves."""
    exact = {_shape(r): r["errors"] for r in rows if r["name"] == "ours" and "errors" in r}
    for r in rows:
        if "of_ideal" in r:
            ideal = {"ms": r["ideal_ms"]}
            both = r["group"] == "ideal" and r["which"] == "forward_backward"
            told = both and bool(r["xla"])  # as `longctx train` compiles
            yield compare_ms(_sharded(r), ideal, r, "ms", f"1/{r['devices']} of one device", told)
        if "of_replicas" in r:
            share = {"ms": r["of_replicas"] * r["ms"]}
            whose = f"1/{r['devices']} of as many devices, each at it alone"
            yield compare_ms(_sharded(r), share, r, "ms", whose)
        if "errors" in r and r["devices"] > 1:
            ours, one = (max(e.values()) for e in (r["errors"], exact[_shape(r)]))
            what = f"{_sharded(r)}: error against float64"
            yield Line(what, "one device", f"{one:.2e}", f"{ours:.2e}", ours / one)
        if "overlap" in r:
            shown = ("all of it", f"{r['overlap']:.1%}")
            yield Line(f"{_sharded(r)}: hidden communication", "", *shown, r["overlap"])


def strategies(rows: Sequence[Row]) -> Iterator[Line]:
    """As `ring`, and what "auto" picks today beside the fastest."""
    yield from ring(rows)
    shapes: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if "of_ideal" in r:
            shapes.setdefault((r["devices"], *_shape(r)), []).append(r)
    for same in shapes.values():
        best = min(same, key=lambda r: r["ms"])
        auto = next((r for r in same if r["name"] == picked(r)), None)
        if auto is not None:
            what = f'"auto" takes {_sharded(auto)}'
            yield compare_ms(what, best, auto, "ms", f"the fastest, {best['name']}")


def ring_training(rows: Sequence[Row]) -> Iterator[Line]:
    """Training over devices: speed per device beside one device's, whose tokens have equal work.

    TNL's have it on as many tokens as each device holds. A Transformer's tokens see more of a
    longer sequence: they have it on the same sequence, and without a row of it nothing is compared.
    """

    def alone(r: Row, length: int) -> tuple[Any, ...]:
        return r["model"], length, r.get("states")

    one = {alone(r, r["length"]): r for r in rows if r["devices"] == 1 and "failed" not in r}
    beside = []
    for r in rows:
        if r["devices"] > 1 and "failed" not in r:
            length = r["per_device" if r["model"] == "TNL" else "length"]
            beside.append((r, length, one.get(alone(r, length))))
    compared = [r for r, _, found in beside if found]
    for r, length, found in beside:
        what = f"training {r['model']}, {r['devices']} devices, {r['per_device']} tokens each"
        if r.get("states") == "ring":
            what += ", states in a ring"
        what, ours = f"{what}: per device", r["tokens_per_second_per_device"]
        if found:
            longest = max(c["per_device"] for c in compared if c["model"] == r["model"])
            headline = r["per_device"] == longest
            theirs = found["tokens_per_second"]
            yield compare_speed(what, f"one device, {length} tokens", theirs, ours, headline)
        else:
            yield Line(what, "", "", f"{ours:,.0f} tokens/s")


def ring_trace(rows: Sequence[Row]) -> Iterator[Line]:
    """Where the time of a step over devices goes, beside one device with as many tokens."""
    one = {(r["model"], r["per_device"]): r for r in rows if r["devices"] == 1}
    for r in (r for r in rows if r["devices"] > 1):
        alone = one[r["model"], r["per_device"]]
        where = f"{r['model']}, {r['devices']} x {r['per_device']} tokens, GPU {r['device_number']}"
        for part, name in (
            ("whole", "a traced step"),
            ("computing", "computing"),
            ("moving_alone", "moving, with no computing beside it"),
            ("idle", "idle"),
        ):
            theirs, ours = alone[f"{part}_ms"], r[f"{part}_ms"]
            yield Line(f"{where}: {name}", "one GPU", f"{theirs:.1f} ms", f"{ours:.1f} ms")


def ring_longest(rows: Sequence[Row]) -> Iterator[Line]:
    """Longest sequences over devices beside one device's."""
    for r in rows:
        if r["devices"] > 1:
            first = r["per_device"] / r["of_first"]
            memory = f"{r['memory_bytes'] / 1e9:.0f} GB each"
            what = f"longest sequence that trains, {r['model']}, {r['devices']} devices, {memory}"
            shown = (f"{first:,.0f} tokens", f"{r['length']:,} tokens")
            yield Line(what, "one device", *shown, r["length"] / first, True)


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
    local = case_of(r).local
    which, each = r["which"].replace("_", " + "), f"{r['devices']} x {local} tokens"
    alone = ", what one computes" if r["part"] == ALONE else ""
    return f"{r['name']}, {which}, {each}, heads {r['heads']}:{r['kv_heads']}{alone}"


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
            where = f"measured at {r['measured_at']}"
            yield compare_ms(f"{_sharded(r)}, predicted", measured, r, "ms", where)
        elif r["per_device"] == 32768 and r["kv_heads"] == 8 and r["name"] in ("ring", "usp"):
            ideal, what = {"ms": r["ideal_ms"]}, f"{r['chip']}: {_sharded(r)}"
            yield compare_ms(what, ideal, r, "ms", f"1/{r['devices']} of one device, predicted too")


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
