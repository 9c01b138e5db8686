"""RESULTS.md, and the table in README.md, from the committed rows: `python -m experiments.results`.

Every number in them is read from a results file; a claim whose file is not there says so. With
--check nothing is written, and the exit code says whether both files are up to date.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longctx.provenance import read_rows

ROOT = Path(__file__).parents[1]
BENCH = Path("experiments/bench/results")
MARKS = ("<!-- results: made by python -m experiments.results -->", "<!-- end of results -->")

# Operators whose times stand in the README too.
HEADLINES = ("hash nb=16", "drop 0.5", "mixed radix, bias and RoPE")

type Row = dict[str, Any]


class Line(NamedTuple):
    """One measured comparison: what, of which rival, and our number, with ours over theirs."""

    what: str
    rival: str
    theirs: str
    ours: str
    ratio: float
    row: Row
    headline: bool = False  # stands in the README too


class Section(NamedTuple):
    """The claims of one paper: where their rows are, and how to read them."""

    title: str
    claim: str
    file: Path
    lines: Callable[[Sequence[Row]], Iterator[Line]]


def _time_line(what: str, rival: Row, ours: Row, key: str, name: str, headline: bool) -> Line:
    theirs, mine = rival[key], ours[key]
    return Line(what, name, f"{theirs:.3f} ms", f"{mine:.3f} ms", mine / theirs, ours, headline)


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
            yield _time_line(f"{name}, {where}", fla, ours, key, "fla chunk_simple_gla", headline)
        floor = {**ours, "forward_ms": ours["forward_floor_ms"]}
        yield _time_line(f"forward, {where}", floor, ours, "forward_ms", "byte floor", False)


def lightning_lengths(rows: Sequence[Row]) -> Iterator[Line]:
    """Time per token at fixed batch and heads, as the length grows."""
    first, *later = [r for r in rows if r["group"] == "lengths"]
    for r in later:
        for key, name in (("forward", "forward"), ("both", "forward + backward")):
            theirs, ours = (x[f"{key}_ns_per_token"] for x in (first, r))
            what = f"time per token, {name}, {r['length']} tokens"
            rival = f"the same at {first['length']}"
            headline = r["platform"] == "cpu"
            yield Line(
                what, rival, f"{theirs:.1f} ns", f"{ours:.1f} ns", ours / theirs, r, headline
            )


def flash(rows: Sequence[Row]) -> Iterator[Line]:
    """Kernel times against cuDNN's, through jax.nn, in the same process."""
    timed = [r for r in rows if "forward_ms" in r]
    for ours in (r for r in timed if r["implementation"] == "ours"):
        shape = ("batch", "length", "heads", "kv_heads", "width", "window", "document")
        rival = next(
            (
                r
                for r in timed
                if r["implementation"] == "cudnn" and all(r[n] == ours[n] for n in shape)
            ),
            None,
        )
        if rival is None:
            continue
        grouped = ours["heads"] != ours["kv_heads"]
        heads = f", heads {ours['heads']}:{ours['kv_heads']}" if grouped else ""
        window = f", window {ours['window']}" if ours["window"] else ""
        where = f"D {ours['width']}, {ours['batch']} x {ours['length']}{heads}{window}"
        for key, name in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
            headline = ours["group"] == "dense" and key == "both_ms"
            yield _time_line(f"{name}, {where}", rival, ours, key, "cuDNN", headline)


def by_operator(rival: str, names: Sequence[str]) -> Callable[[Sequence[Row]], Iterator[Line]]:
    """Lines for files that have a row per operator, at one or several lengths."""

    def lines(rows: Sequence[Row]) -> Iterator[Line]:
        for ours in rows:
            if not ours["operator"].startswith(tuple(names)):
                continue
            theirs = next(
                r for r in rows if r["operator"] == rival and r["length"] == ours["length"]
            )
            for key, name in (("forward", "forward"), ("forward_backward", "forward + backward")):
                where = f"{ours['operator']}, {name}, {ours.get('batch', 1)} x {ours['length']}"
                headline = key == "forward_backward" and ours["operator"] in HEADLINES
                yield _time_line(where, theirs, ours, f"{key}_ms", rival, headline)

    return lines


def training_speed(rows: Sequence[Row]) -> Iterator[Line]:
    """Tokens per second of whole training steps: flat in the length, and beside others'."""

    def line(what: str, rival: str, theirs: float, row: Row, headline: bool = False) -> Line:
        ours = row["tokens_per_second"]
        there, here = f"{theirs:,.0f} tokens/s", f"{ours:,.0f} tokens/s"
        return Line(what, rival, there, here, ours / theirs, row, headline)

    speed = {(r["model"], r["length"]): r for r in rows}
    lengths = sorted({r["length"] for r in rows})
    for length in lengths:
        row, what = speed["TNL", length], f"training, 385M, sequences of {length}"
        if length > lengths[0]:
            first = speed["TNL", lengths[0]]["tokens_per_second"]
            yield line(what, f"the same at {lengths[0]}", first, row, headline=True)
        if row["paper"]:
            yield line(what, "the paper's, one of two A100", row["paper"], row)
        if ("Transformer", length) in speed:
            other = speed["Transformer", length]["tokens_per_second"]
            yield line(what, "our softmax Transformer", other, row, headline=True)


def ablation(rows: Sequence[Row]) -> Iterator[Line]:
    """Differences from the base arm, ours in bits per byte; a ratio of them means nothing."""
    from longctx.reproduce.ablation import compare

    for result in compare(rows):
        row = next(r for r in rows if r["arm"] == result.arm)
        if not result.is_base:
            paper = "" if result.paper_difference is None else f"{result.paper_difference:+.3f}"
            what = f"{row['title']}: {result.arm} against {row['base']}"
            yield Line(what, row["source"], paper, result.verdict, float("nan"), row)


TRANSNORMER = Path("experiments/transnormer/results")
SECTIONS = [
    Section(
        "Lightning attention",
        "Constant time per token at any length (2401.04658), faster than every peer.",
        BENCH / "lightning_gpu.jsonl",
        lightning,
    ),
    Section(
        "Lightning attention by length",
        "Time per token does not depend on the length (2401.04658).",
        BENCH / "lightning_gpu_lengths.jsonl",
        lightning_lengths,
    ),
    Section(
        "Lightning attention by length, plain JAX on two CPU cores",
        "Heads of 128 in float32. Two runs on this shared machine differ by up to 20%.",
        BENCH / "lightning_cpu.jsonl",
        lightning_lengths,
    ),
    Section(
        "Flash attention over intervals",
        "Dense causal attention as fast as cuDNN's. Other processes shared this GPU meanwhile.",
        BENCH / "flash_shared_gpu.jsonl",
        flash,
    ),
    Section(
        "TransNormerLLM: training speed",
        "Tokens per second do not fall with the length (2405.17381).",
        TRANSNORMER / "training_speed-paper.jsonl",
        training_speed,
    ),
    *(
        Section(
            f"TransNormerLLM: {name.replace('_', ' ')}",
            "Ablation of 2405.17381 at reduced scale.",
            TRANSNORMER / f"{name}-small.jsonl",
            ablation,
        )
        for name in (
            "positional_encoding",
            "decay_temperature",
            "gating",
            "normalization",
            "gla_activation",
            "glu_activation",
            "transformer",
        )
    ),
    *(
        Section(
            f"Sparse flash attention, {length} tokens",
            "Dropping and hashing beat dense attention (2306.01160), everything included.",
            BENCH / f"sparse_{length}.jsonl",
            by_operator("cudnn dense", ("hash", "drop", "our dense")),
        )
        for length in (8192, 16384, 32768)
    ),
    Section(
        "Ring attention",
        "Two GPUs take half of one GPU's time (2310.01889).",
        BENCH / "ring.jsonl",
        by_operator("ideal", ("ring",)),
    ),
    Section(
        "Tensorized attention",
        "The operator is 11x faster than dense attention at 128K tokens (2410.20926).",
        BENCH / "tensorized.jsonl",
        by_operator("cudnn dense", ("mixed radix",)),
    ),
]


def results() -> str:
    """The text of RESULTS.md."""
    text = [
        "# Results",
        "",
        "Made from the committed rows by `python -m experiments.results`; nothing is typed.",
        "A ratio is ours over theirs in one run on one machine: times below 1, speeds above 1 are",
        "better. What was not measured says so.",
    ]
    for section in SECTIONS:
        text += ["", f"## {section.title}", "", section.claim, ""]
        path = ROOT / section.file
        if not path.exists():
            text.append(f"Not measured yet: `{section.file}` does not exist.")
            continue
        rows = read_rows(path)
        text += ["| what | beside | theirs | ours | ratio |", "|---|---|---|---|---|"]
        text += [_shown(line) for line in section.lines(rows)]
        text += ["", _origin(rows[0], section.file)]
    return "\n".join(text) + "\n"


def readme_table() -> str:
    """The headline lines."""
    text = ["| what | beside | theirs | ours | ratio |", "|---|---|---|---|---|"]
    for section in SECTIONS:
        if (ROOT / section.file).exists():
            rows = read_rows(ROOT / section.file)
            text += [_shown(line, section.title) for line in section.lines(rows) if line.headline]
    return "\n".join(text)


def _shown(line: Line, title: str = "") -> str:
    what = f"{title}: {line.what}" if title else line.what
    ratio = "" if line.ratio != line.ratio else f"{line.ratio:.2f}"
    return f"| {what} | {line.rival} | {line.theirs} | {line.ours} | {ratio} |"


def _origin(row: Row, file: Path) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    driver = f", driver {row['driver']}" if row["driver"] else ""
    commit = f"; commit {row['commit']}" if row["commit"] else ""
    return (
        f"{row['device_count']} x {row['device']}{driver}; {versions}; {row['date'][:10]}{commit}. "
        f"`{row['command']}`; rows in `{file}`."
    )


def with_table(readme: str) -> str:
    """The README with a new table between its marks."""
    before, _, rest = readme.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    return f"{before}{MARKS[0]}\n{readme_table()}\n{MARKS[1]}{after}"


def main() -> None:
    """Write both files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    wanted = {ROOT / "RESULTS.md": results(), readme: with_table(readme.read_text())}
    for path, text in wanted.items():
        if not options.check:
            path.write_text(text)
        elif path.read_text() != text:
            raise SystemExit(f"{path.name} is out of date: run python -m experiments.results")


if __name__ == "__main__":
    main()
