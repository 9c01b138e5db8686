"""Synthetic long-context tasks: deterministic generators that serve for training and evaluation."""

import dataclasses

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
from longctx.tasks.text import CommonWords, LineRetrieval, Needle, TextTask, VariableTracking

TASKS: dict[str, Task] = {
    "needle": Needle(),
    "multi-key": Needle(keys=8),
    "multi-value": Needle(keys=4, values=3),
    "lines": LineRetrieval(),
    "variables": VariableTracking(),
    "common-words": CommonWords(),
    "mqar": MultiQueryRecall(vocab_size=64),  # small models learn so few symbols in minutes
    "mqar-64": MultiQueryRecall(pairs=64),  # about what a state of 64 x 64 can hold
    "mqar-often": MultiQueryRecall(queries=100, vocab_size=64),  # more to learn from
    "copying": Copying(),
    "induction": Induction(),
}


def named_task(name: str, codec: TextCodec = BYTES) -> Task:
    """The task `name` of `TASKS`; what text it has is in the tokens of `codec`.

    Raises:
      ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name}; there are {', '.join(TASKS)}")
    task = TASKS[name]
    return dataclasses.replace(task, codec=codec) if isinstance(task, TextTask) else task


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
    "TextTask",
    "VariableTracking",
    "answer_spans",
    "episodes",
    "named_task",
    "score",
]
