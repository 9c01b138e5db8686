"""A line of RESULTS.md, and what readers of rows share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments.bench._claims import Claim

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


def compare_ms(
    what: str, rival: Row, ours: Row, key: str, name: str, headline: bool = False
) -> Line:
    """Times in milliseconds, those of `key` in both rows."""
    theirs, mine = rival[key], ours[key]
    return Line(what, name, f"{theirs:.3f} ms", f"{mine:.3f} ms", mine / theirs, headline)


def compare_speed(what: str, name: str, theirs: float, ours: float, headline: bool = False) -> Line:
    """Speeds in tokens per second."""
    shown = (f"{theirs:,.0f} tokens/s", f"{ours:,.0f} tokens/s")
    return Line(what, name, *shown, ours / theirs, headline)


def judged(reader: Reader, claims: Callable[[Sequence[Row]], Iterator[Claim]]) -> Reader:
    """What `reader` reads, and those claims of the benchmark that were measured."""

    def lines(rows: Sequence[Row]) -> Iterator[Line]:
        yield from reader(rows)
        for claim in claims(rows):
            if claim.ratio is not None:
                yield Line(claim.what, claim.rule, "", f"{claim.ratio:.3g}, {claim.verdict}")

    return lines
