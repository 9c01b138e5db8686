"""RESULTS.md, and the table in README.md, from the committed rows: `python -m experiments.results`.

Every number in them is read from a results file named in `experiments.claims`; claims whose rows
are not there stand in one table with what it takes to measure them, and results of the papers that
nothing here repeats in another. With --check nothing is
written, and the exit code says whether both files are up to date.
"""

import argparse
from collections.abc import Iterable, Sequence

from experiments.claims import PAPERS, ROOT, Section
from experiments.left_out import LEFT_OUT
from experiments.lines import Line, Row
from longctx.provenance import read_rows

MARKS = ("<!-- results: made by python -m experiments.results -->", "<!-- end of results -->")
HEAD = ["| what | beside | theirs | ours | ratio |", "|---|---|---|---|---|"]
INTRODUCTION = """# Results

Made from the committed rows by `python -m experiments.results`; nothing is typed.
A ratio is ours over theirs: times below 1, speeds above 1 are better. Where a paper's own number
stands beside ours, the device differs; everything else was measured on one machine in one run, but
in sections that name several devices, commits or commands, whose rows are of several runs.
At the end stand what was [not measured yet](#not-measured-yet), with what it takes, and what of the
papers is [left out](#left-out), with the reason.
"""


def results() -> str:
    """The text of RESULTS.md."""
    text = [INTRODUCTION]
    for paper, sections in PAPERS.items():
        measured = [section for section in sections if section.is_measured]
        text.append(f"## {paper}\n")
        if not measured:
            text.append("Nothing measured yet.\n")
        for section in measured:
            rows = read_rows(ROOT / section.file)
            text += [f"### {section.title}\n", f"{section.claim}\n", *HEAD]
            text += [_shown(line) for line in section.lines(rows)]
            text += ["", _origin(rows, section) + "\n"]
    text += ["## Not measured yet\n", "| what | claim | it takes | command |", "|---|---|---|---|"]
    for section in (s for sections in PAPERS.values() for s in sections if not s.is_measured):
        cells = (section.title, section.claim, section.needs, f"`{section.command}`")
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Left out\n", "| what | source | reason |", "|---|---|---|"]
    text += [f"| {' | '.join(cells)} |" for cells in LEFT_OUT]
    return "\n".join(text) + "\n"


def readme_table() -> str:
    """The headline lines."""
    text = [*HEAD]
    sections = (s for sections in PAPERS.values() for s in sections)
    for section in (s for s in sections if s.is_measured and not s.superseded):
        rows = read_rows(ROOT / section.file)
        text += [_shown(line, section.title) for line in section.lines(rows) if line.headline]
    return "\n".join(text)


def _shown(line: Line, title: str = "") -> str:
    what = f"{title}: {line.what}" if title else line.what
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    return f"| {what} | {line.beside} | {line.theirs} | {line.ours} | {ratio} |"


def _origin(rows: Sequence[Row], section: Section) -> str:
    """Where and when all rows were measured, with the software of the first."""
    row = rows[0]
    devices = _all(f"{r['device_count']} x {r['device']}" for r in rows)
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    driver = f", driver {row['driver']}" if row["driver"] else ""
    commits = _all(r["commit"] for r in rows if r["commit"])
    commit = f"; commit {commits}" if commits else ""
    commands = _all(f"`{r['command']}`" for r in rows)
    return (
        f"{devices}{driver}; {versions}; {_all(r['date'][:10] for r in rows)}{commit}. "
        f"{commands}; rows in `{section.file}`."
    )


def _all(values: Iterable[str]) -> str:
    """Each once."""
    return ", ".join(dict.fromkeys(values))


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
