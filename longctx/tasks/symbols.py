"""Tasks over bare symbols: associative recall, copying, induction. Token ids below `vocab_size`."""

import dataclasses

import numpy as np

from longctx.tasks.episode import Episode


def _check_vocabulary(vocab_size: int, needed: int, task: str) -> None:
    if vocab_size < needed:
        raise ValueError(f"{vocab_size=} must be at least {needed} for {task}")


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall:
    """MQAR: key-value pairs, then some of the keys again, each to be followed by its value.

    The layout of Zoology (2312.04927, section 3.1): pairs first, queries at random places after
    them, noise between. Keys come from the lower half of the vocabulary, values from the upper
    half, token 0 is noise, so a score above `chance` needs recall. With `queries` so many keys are
    asked for, or as many as there is room for, each drawn anew; with 0 each key once, and then the
    last queries can be answered without recall too, by the values not given yet.
    """

    pairs: int = 8
    queries: int = 0
    vocab_size: int = 256

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocab_size, 2 * self.pairs + 2, "MQAR")

    @property
    def chance(self) -> float:
        """One over the number of values."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """Pairs, then keys once more in random order at random places."""
        slots = (length - 2 * self.pairs) // 2
        queries = min(self.queries, max(slots, 1)) or self.pairs
        if slots < queries:
            raise ValueError(f"{length=} must be at least {2 * (self.pairs + queries)}, two a pair")
        half = self.vocab_size // 2
        keys = rng.choice(np.arange(1, half), self.pairs, replace=False)
        values = rng.integers(half, self.vocab_size, self.pairs)
        tokens = np.zeros(length, np.int32)
        answer = np.zeros(length, bool)
        tokens[0 : 2 * self.pairs : 2] = keys
        tokens[1 : 2 * self.pairs : 2] = values
        at = 2 * self.pairs + 2 * np.sort(rng.choice(slots, queries, replace=False))
        order = rng.permutation(self.pairs)
        if self.queries:
            order = rng.integers(0, self.pairs, queries)
        tokens[at] = keys[order]
        tokens[at + 1] = values[order]
        answer[at + 1] = True
        return Episode(tokens, answer)

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """The value that followed the last key when it first appeared."""
        first = int(np.flatnonzero(prompt == prompt[-1])[0])
        return prompt[first + 1 : first + 2]


@dataclasses.dataclass(frozen=True)
class Copying:
    """A random string, a separator (token 0), the string again."""

    vocab_size: int = 256

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocab_size, 3, "copying")

    @property
    def chance(self) -> float:
        """Zero to any useful precision: the whole string must be right."""
        return 0.0

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """The string fills half of the sequence; an odd length is padded by a leading separator."""
        if length < 3:
            raise ValueError(f"{length=} must be at least 3")
        n = (length - 1) // 2
        text = rng.integers(1, self.vocab_size, n)
        lead = length - 2 * n - 1
        tokens = np.concatenate([np.zeros(lead, int), text, [0], text]).astype(np.int32)
        answer = np.zeros(length, bool)
        answer[-n:] = True
        return Episode(tokens, answer)

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """Everything between the separators."""
        text = prompt[:-1]
        return text[text != 0]


@dataclasses.dataclass(frozen=True)
class Induction:
    """Random symbols with one trigger, met twice: what followed it first must follow it again.

    The induction-head task of H3 (2212.14052, table 1): the sequence ends with the trigger.
    """

    vocab_size: int = 256

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocab_size, 3, "induction")

    @property
    def chance(self) -> float:
        """One over the number of ordinary symbols."""
        return 1 / (self.vocab_size - 1)

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """Token 0 is the trigger; its first place is uniform over the sequence."""
        if length < 4:
            raise ValueError(f"{length=} must be at least 4")
        tokens = rng.integers(1, self.vocab_size, length).astype(np.int32)
        first = int(rng.integers(0, length - 3))
        tokens[[first, length - 2]] = 0
        tokens[-1] = tokens[first + 1]
        answer = np.zeros(length, bool)
        answer[-1] = True
        return Episode(tokens, answer, depth=first / (length - 3))

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """The symbol behind the first trigger."""
        first = int(np.flatnonzero(prompt == 0)[0])
        return prompt[first + 1 : first + 2]
