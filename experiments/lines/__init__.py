"""How committed rows are read as comparisons: one function per kind of results file."""

from experiments.lines.devices import (
    extrapolated,
    max_context,
    plans,
    ring,
    ring_longest,
    ring_methods,
    ring_trace,
    ring_training,
    schedule,
    strategies,
)
from experiments.lines.kernels import (
    by_operator,
    checked,
    coverage,
    flash,
    lightning,
    lightning_generations,
    lightning_lengths,
    tiles,
)
from experiments.lines.line import Line, Reader, Row, judged
from experiments.lines.models import (
    ablation,
    decoding,
    hybrids,
    recall,
    training_speed,
    wikitext103,
)

__all__ = [
    "Line",
    "Reader",
    "Row",
    "ablation",
    "by_operator",
    "checked",
    "coverage",
    "decoding",
    "extrapolated",
    "flash",
    "hybrids",
    "judged",
    "lightning",
    "lightning_generations",
    "lightning_lengths",
    "max_context",
    "plans",
    "recall",
    "ring",
    "ring_longest",
    "ring_methods",
    "ring_trace",
    "ring_training",
    "schedule",
    "strategies",
    "tiles",
    "training_speed",
    "wikitext103",
]
