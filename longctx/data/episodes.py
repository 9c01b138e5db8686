"""Synthetic long-context tasks as data: `task:NAME`, or `task:NAME+NAME` for several in turn.

`NAME@LENGTH` packs episodes of LENGTH tokens into each sequence, as many as fit: recall is learned
far sooner from short ones (the training mixture of 2312.04927 has several lengths too).
"""

import dataclasses
from typing import SupportsIndex

import numpy as np

from longctx.data.config import DataConfig, DataError, Split
from longctx.data.packing import Example
from longctx.errors import told_as
from longctx.tasks import Task, TextCodec, named_task
from longctx.tasks.episode import episode_at

PREFIX = "task:"

# Episodes in one pass; any number would do, since each is made when it is read.
EPISODES = 2**20


def shorter(task: str, length: int) -> tuple[str, ...]:
    """Sources of `task` in episodes of an eighth, a quarter and half of `length` tokens.

    None is shorter than 32: eight pairs to recall, and as many questions.
    """
    lengths = dict.fromkeys(max(32, length // parts) for parts in (8, 4, 2))
    return tuple(f"{task}@{short}" for short in lengths)


@dataclasses.dataclass(frozen=True)
class Source:
    """A task, and the length of its episodes; None: that of the sequence."""

    task: Task
    length: int | None

    @classmethod
    def named(cls, text: str, codec: TextCodec) -> "Source":
        """What `NAME` or `NAME@LENGTH` stands for.

        Raises:
          ValueError: there is no such task, or the length is not a positive number.
        """
        name, at, length = text.partition("@")
        if at and not (length.isdecimal() and int(length) > 0):
            raise ValueError(f"{text} must have a positive number of tokens behind @")
        return cls(named_task(name, codec), int(length) if at else None)


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The episodes of tasks, in turn: what a `Corpus` is for text; its loss is in nats a token."""

    name: str
    sources: tuple[Source, ...]
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
    with told_as(DataError, where=f"data.source={config.source}"):
        sources = tuple(Source.named(one, codec) for one in name.split("+"))
    needed = max(source.task.vocab_size for source in sources)
    if needed > vocab_size:
        raise DataError(
            f"data.source={config.source} needs model.vocab_size={vocab_size} to be at least "
            f"{needed}"
        )
    return Episodes(name, sources, split, config.seed)


class EpisodeRows:
    """Random access to the episodes of tasks: a grain source of `Example`.

    Only the answers are targets: what else an episode holds cannot be predicted.
    """

    def __init__(self, episodes: Episodes, length: int) -> None:
        self._sources = episodes.sources
        self._seed, self._split = episodes.seed, "train" if episodes.split == "train" else "test"
        self._length = length
        with told_as(DataError, where=f"data.source={PREFIX}{episodes.name}"):
            for index, source in enumerate(self._sources):
                if (source.length or 0) > length:
                    raise ValueError(
                        f"episodes of {source.length} tokens must fit in sequences of {length}"
                    )
                self[index]

    def __len__(self) -> int:
        return EPISODES

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = int(index)
        source = self._sources[index % len(self._sources)]
        length = source.length or self._length
        starts = np.arange(0, self._length - length + 1, length)
        tokens = np.zeros(self._length, np.int32)  # what is left at the end belongs to the last
        targets = np.full(self._length, -1, np.int32)
        for place, start in enumerate(starts):
            # One token more than the sequence, so that its last token has a target too.
            episode = episode_at(
                source.task,
                index + place * EPISODES,
                length=length + 1,
                seed=self._seed,
                split=self._split,
            )
            answers = np.where(episode.answer, episode.tokens, -1)
            tokens[start : start + length] = episode.tokens[:-1]
            targets[start : start + length] = answers[1:]
        at = np.arange(self._length, dtype=np.int32)
        doc_start = starts[np.minimum(at // length, len(starts) - 1)].astype(np.int32)
        return {
            "tokens": tokens,
            "targets": targets,
            "doc_start": doc_start,
            "positions": at - doc_start,
            "index": np.asarray(index),
        }
