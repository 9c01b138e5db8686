"""Synthetic long-context tasks: deterministic generators that serve for training and evaluation."""

from longctx.tasks.episode import (
    BYTES,
    Episode,
    Task,
    TextCodec,
    answer_spans,
    episodes,
    score,
)
from longctx.tasks.symbols import Copying, Induction, MultiQueryRecall
from longctx.tasks.text import CommonWords, LineRetrieval, Needle, VariableTracking

TASKS: dict[str, Task] = {
    "needle": Needle(),
    "multi-key": Needle(keys=8),
    "multi-value": Needle(keys=4, values=3),
    "lines": LineRetrieval(),
    "variables": VariableTracking(),
    "common-words": CommonWords(),
    "mqar": MultiQueryRecall(),
    "copying": Copying(),
    "induction": Induction(),
}

__all__ = [
    "BYTES",
    "TASKS",
    "CommonWords",
    "Copying",
    "Episode",
    "Induction",
    "LineRetrieval",
    "MultiQueryRecall",
    "Needle",
    "Task",
    "TextCodec",
    "VariableTracking",
    "answer_spans",
    "episodes",
    "score",
]
