"""What a benchmark must show, judged from its own rows."""

from collections.abc import Iterable
from typing import NamedTuple


class Claim(NamedTuple):
    """A ratio and its bound; `ratio` is None where a row that it needs is missing."""

    what: str
    ratio: float | None
    bound: float
    at_least: bool = False

    @property
    def rule(self) -> str:
        """The bound in words."""
        return f"at {'least' if self.at_least else 'most'} {self.bound:.4g}"

    @property
    def verdict(self) -> str:
        """`met`, `MISSED` or `not measured`."""
        if self.ratio is None:
            return "not measured"
        met = self.ratio >= self.bound if self.at_least else self.ratio <= self.bound
        return "met" if met else "MISSED"


def over(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs, or None if one is missing."""
    return None if ours is None or theirs is None else ours / theirs


def claims_table(claims: Iterable[Claim]) -> str:
    """The claims as Markdown."""
    lines = ["| must show | measured | bound | |", "|---|---|---|---|"]
    for claim in claims:
        measured = "" if claim.ratio is None else f"{claim.ratio:.4g}"
        lines.append(f"| {claim.what} | {measured} | {claim.rule} | {claim.verdict} |")
    return "\n".join(lines)
