"""What every long-context task makes: a sequence of fixed length with its answers marked."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from longctx.data.tokenizer import load_tokenizer

SPLITS = {"train": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class Episode:
    """One sequence and the tokens of it that count.

    Attributes:
      tokens: int32 [T].
      answer: bool [T]; token t is scored when predicted from tokens 0..t-1. Every unbroken run
        of marked tokens is one answer, right only if all of it is right.
      depth: where the sought fact stands, 0 (start of the context) to 1 (just before the
        question); NaN for tasks without one such place.
    """

    tokens: np.ndarray
    answer: np.ndarray
    depth: float = float("nan")


class Task(Protocol):
    """A generator of episodes that knows how to solve them and what guessing is worth."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def chance(self) -> float:
        """Expected score of the best answer that does not read the context."""
        ...

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """An episode of exactly `length` tokens; ValueError if that is too short."""
        ...

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """The answer that should follow `prompt`, found by reading it."""
        ...


def episode_at(task: Task, index: int, *, length: int, seed: int, split: str) -> Episode:
    """Episode `index` of a task: it depends on (seed, split, index) alone.

    Raises:
      ValueError: `split` is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"{split=} must be one of {sorted(SPLITS)}")
    return task.episode(np.random.default_rng([seed, SPLITS[split], index]), length)


def episodes(
    task: Task, *, length: int, seed: int = 0, split: str = "test", start: int = 0
) -> Iterator[Episode]:
    """The endless stream of `episode_at`, from `start` on."""
    for index in itertools.count(start):
        yield episode_at(task, index, length=length, seed=seed, split=split)


def answer_spans(answer: np.ndarray) -> list[slice]:
    """The unbroken runs of True in `answer` (bool [T])."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], answer, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def score(episode: Episode, predicted: np.ndarray) -> float:
    """Share of the answers of `episode` that `predicted` (int [T]) gets right."""
    right = [
        bool(np.array_equal(predicted[span], episode.tokens[span]))
        for span in answer_spans(episode.answer)
    ]
    return sum(right) / len(right)


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """How text becomes tokens, ids below `vocab_size`: as bytes, or by a tokenizer."""

    encode: Callable[[str], Sequence[int]] = lambda text: list(text.encode())
    decode: Callable[[Sequence[int]], str] = lambda tokens: bytes(tokens).decode(errors="replace")
    vocab_size: int = 256

    @classmethod
    def named(cls, tokenizer: str) -> "TextCodec":
        """That of a run's `data.tokenizer`: "bytes", or the path of a tokenizer.json."""
        if tokenizer == "bytes":
            return BYTES
        loaded = load_tokenizer(tokenizer)
        return cls(
            encode=lambda text: loaded.encode(text.encode()).tolist(),
            decode=loaded.decode,
            vocab_size=loaded.vocab_size,
        )


BYTES = TextCodec()
