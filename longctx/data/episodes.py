"""Synthetic long-context tasks as data: `task:NAME`, or `task:NAME+NAME` for several in turn."""

import dataclasses
from typing import SupportsIndex

import numpy as np

from longctx.data.config import DataConfig, DataError, Split
from longctx.data.packing import Example
from longctx.tasks import Task, TextCodec, named_task
from longctx.tasks.episode import episode_at

PREFIX = "task:"

# Episodes in one pass; any number would do, since each is made when it is read.
EPISODES = 2**20


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The episodes of tasks, in turn: what a `Corpus` is for text; its loss is in nats a token."""

    name: str
    tasks: tuple[Task, ...]
    split: Split
    seed: int

    bytes_per_token = 1.0

    def windows(self, length: int) -> "EpisodeRows":
        """Its episodes of `length` tokens."""
        return EpisodeRows(self, length)

    def __str__(self) -> str:
        return f"episodes of {self.name}"


def load_episodes(config: DataConfig, split: Split, *, vocab_size: int) -> Episodes:
    """The episodes that `task:NAME+NAME` stands for; held-out ones differ from those of training.

    Raises:
      DataError: there is no such task, or the model lacks some of its tokens.
    """
    name = config.source.removeprefix(PREFIX)
    codec = TextCodec.named(config.tokenizer)
    try:
        tasks = tuple(named_task(one, codec) for one in name.split("+"))
    except ValueError as error:
        raise DataError(f"data.source={config.source}: {error}") from error
    needed = max(task.vocab_size for task in tasks)
    if needed > vocab_size:
        raise DataError(
            f"data.source={config.source} needs model.vocab_size={vocab_size} to be at least "
            f"{needed}"
        )
    return Episodes(name, tasks, split, config.seed)


class EpisodeRows:
    """Random access to the episodes of tasks: a grain source of `Example`.

    Only the answers are targets: what else an episode holds cannot be predicted.
    """

    def __init__(self, episodes: Episodes, length: int) -> None:
        self._tasks = episodes.tasks
        self._seed, self._split = episodes.seed, "train" if episodes.split == "train" else "test"
        self._length = length
        try:
            for index in range(len(self._tasks)):
                self[index]
        except ValueError as error:
            raise DataError(f"data.source={PREFIX}{episodes.name}: {error}") from error

    def __len__(self) -> int:
        return EPISODES

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = int(index)
        task = self._tasks[index % len(self._tasks)]
        # One token more than the sequence, so that its last token has a target too.
        episode = episode_at(
            task, index, length=self._length + 1, seed=self._seed, split=self._split
        )
        return {
            "tokens": episode.tokens[:-1],
            "targets": np.where(episode.answer, episode.tokens, -1)[1:].astype(np.int32),
            "doc_start": np.zeros(self._length, np.int32),
            "positions": np.arange(self._length, dtype=np.int32),
            "index": np.asarray(index),
        }
