"""Rows of whole models: their speed, their losses, what they recall."""

from collections.abc import Iterator, Sequence

from experiments.hybrids.recall import accuracy
from experiments.lines.line import Line, Row, compare_speed
from experiments.transnormer.wikitext103 import PAPER_PERPLEXITY as WIKITEXT103
from longctx.reproduce.ablation import compare


def training_speed(rows: Sequence[Row]) -> Iterator[Line]:
    """Tokens per second of whole training steps: flat in the length, and beside others'."""
    rows = [r for r in rows if "failed" not in r]
    speed = {(r["model"], r["length"]): r["tokens_per_second"] for r in rows}
    first, *_ = lengths = sorted({r["length"] for r in rows})
    paper = {r["length"]: r["paper"] for r in rows if r["model"] == "TNL"}
    for length in lengths:
        ours, what = speed["TNL", length], f"training, 385M, sequences of {length}"
        told = length == lengths[-1]
        if length > first:
            yield compare_speed(what, f"the same at {first}", speed["TNL", first], ours, told)
        if paper[length]:
            yield compare_speed(what, "the paper's, one of two A100", paper[length], ours)
        if ("Transformer", length) in speed:
            other = speed["Transformer", length]
            yield compare_speed(what, "our softmax Transformer", other, ours, told)


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
        yield compare_speed(what, f"after {first}", *speeds, headline=model == "TNL")
        there, here = (f"{r['row_bytes'] / 1e6:,.1f} MB" for r in (beside, ours))
        ratio = ours["row_bytes"] / beside["row_bytes"]
        yield Line(f"{what}, cache per row", f"after {first}", there, here, ratio)
    last = max(set(contexts["TNL"]) & set(contexts["Transformer"]))
    speeds = (at["Transformer", last]["tokens_per_second"], at["TNL", last]["tokens_per_second"])
    yield compare_speed(f"decoding after {last} tokens", "our softmax Transformer", *speeds)
