"""Synthetic long-context tasks as training data: a source named `task:NAME`."""

from typing import SupportsIndex

import numpy as np

from longctx.data.config import DataError
from longctx.data.packing import Example
from longctx.eval.tasks import TASKS, Task
from longctx.eval.tasks.episode import SPLITS

PREFIX = "task:"

# Episodes in one pass of training; any number would do, since each is made when it is read.
EPISODES = 2**20


class EpisodeRows:
    """Random access to the training episodes of a task: a grain source.

    Only the answers are targets: what else an episode holds cannot be predicted.
    """

    def __init__(self, source: str, length: int, *, seed: int, split: str = "train") -> None:
        name = source.removeprefix(PREFIX)
        if name not in TASKS:
            raise DataError(f"data.source={source}: there are the tasks {', '.join(TASKS)}")
        self._task: Task = TASKS[name]
        self._length, self._seed, self._split = length, seed, SPLITS[split]
        try:
            self[0]
        except ValueError as error:
            raise DataError(f"data.source={source}: {error}") from error

    def __len__(self) -> int:
        return EPISODES

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = int(index)
        rng = np.random.default_rng([self._seed, self._split, index])
        # One token more than the sequence, so that its last token has a target too.
        episode = self._task.episode(rng, self._length + 1)
        return {
            "tokens": episode.tokens[:-1],
            "targets": np.where(episode.answer, episode.tokens, -1)[1:].astype(np.int32),
            "doc_start": np.zeros(self._length, np.int32),
            "index": np.asarray(index),
        }
