"""One look for the figures of runs and experiments."""

from collections.abc import Sequence
from typing import Any


def tidy(axes: Any) -> None:
    """Axes of matplotlib without their box, on a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def length_axis(axes: Any, lengths: Sequence[int], label: str) -> None:
    """A logarithmic x axis of lengths in tokens, with these ones written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [_short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _short(length: int) -> str:
    """1024 as 1K, 1048576 as 1M; others as they are."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"
