"""Tasks in plain text: needles, line retrieval and offline forms of RULER's tasks (2404.06654).

Every task is a set of facts hidden in filler text, a question, and an answer that follows it.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from longctx.tasks.episode import BYTES, Episode, TextCodec

_FILLER = (
    "The road along the river was quiet in the morning. ",
    "A boat went by and left a long wake behind it. ",
    "Nobody at the market could remember a drier summer. ",
    "The clock above the station had stopped years ago. ",
    "Two children were building a wall out of flat stones. ",
    "The baker opened his shutters and swept the step. ",
    "Clouds gathered over the hills but no rain came. ",
    "An old map of the valley hung beside the door. ",
    "The train was late and the platform filled slowly. ",
    "She wrote a letter and then put it away unsent. ",
    "The garden smelled of mint and warm earth. ",
    "He counted the steps to the tower and lost his place. ",
)
_NAMES = (
    "amber birch cedar delta ember fjord grove haven islet jetty knoll ledge maple north ocean "
    "pearl quill raven slate thorn umber vista willow xenon yarrow zephyr"
).split()


@dataclasses.dataclass(frozen=True)
class Fact:
    """A sentence and where it goes, 0 (start) to 1 (end of the context)."""

    text: str
    depth: float


def hide(
    codec: TextCodec,
    rng: np.random.Generator,
    length: int,
    facts: list[Fact],
    question: str,
    answer: str,
) -> Episode:
    """Filler with `facts` at their depths, then `question` and `answer`: exactly `length` tokens.

    Raises:
      ValueError: the facts, question and answer alone are longer than `length`.
    """
    pieces = [(fact, codec.encode(fact.text)) for fact in sorted(facts, key=lambda f: f.depth)]
    tail, target = codec.encode(question), codec.encode(answer)
    room = length - sum(len(ids) for _, ids in pieces) - len(tail) - len(target)
    if room < 0:
        raise ValueError(f"{length=} must be at least {length - room} for these facts and question")
    sentences = [codec.encode(text) for text in _FILLER]
    sentence: Sequence[int] = ()
    tokens: list[int] = []
    used = 0
    for fact, ids in [*pieces, (Fact("", 1.0), [])]:
        while used < room:
            sentence = sentence or sentences[int(rng.integers(len(sentences)))][: room - used]
            if fact.depth * room - used < len(sentence) / 2:
                break  # the fact goes where sentences meet nearest to its depth
            tokens += sentence
            used += len(sentence)
            sentence = ()
        tokens += ids
    marked = np.zeros(length, bool)
    marked[length - len(target) :] = True
    depth = facts[0].depth if len(facts) == 1 else float("nan")
    return Episode(np.asarray([*tokens, *tail, *target], np.int32), marked, depth)


@dataclasses.dataclass(frozen=True)
class TextTask:
    """What tasks in plain text share: how it becomes tokens."""

    codec: TextCodec = BYTES

    @property
    def vocab_size(self) -> int:
        """That of the codec."""
        return self.codec.vocab_size


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(str(d) for d in rng.integers(0, 10, count))


@dataclasses.dataclass(frozen=True)
class Needle(TextTask):
    """Magic numbers in a haystack: one needle, many keys (RULER MK), or several values (RULER MV).

    Attributes:
      keys: how many keys have numbers; one is asked for.
      values: how many numbers each key has; all must be given, in the order of the text.
      depth: where the asked-for needle stands; None draws it per episode. Needs `values` = 1.
    """

    keys: int = 1
    values: int = 1
    depth: float | None = None
    digits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.keys <= len(_NAMES):
            raise ValueError(f"keys={self.keys} must be between 1 and {len(_NAMES)}")
        if self.depth is not None and (self.values != 1 or not 0 <= self.depth <= 1):
            raise ValueError(f"depth={self.depth} must lie in [0, 1] and needs values=1")

    @property
    def chance(self) -> float:
        """Guessing every digit."""
        return 0.1 ** (self.digits * self.values)

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """Needles at uniform depths (or the asked-for one at `depth`), question last."""
        names = list(rng.choice(_NAMES, self.keys, replace=False))
        facts, wanted = [], []
        for name in names:
            depths = np.sort(rng.uniform(0, 1, self.values))
            if name == names[0] and self.depth is not None:
                depths = np.asarray([self.depth])
            for depth in depths:
                number = _digits(rng, self.digits)
                facts.append(Fact(f"The magic number for {name} is {number}. ", float(depth)))
                if name == names[0]:
                    wanted.append(number)
        ask = f"Question: which numbers belong to {names[0]}? Answer: "
        return hide(self.codec, rng, length, facts, ask, " ".join(wanted))

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """All numbers stated for the name in the question, in order."""
        text = self.codec.decode(prompt.tolist())
        name = re.findall(r"belong to (\w+)\?", text)[-1]
        found = re.findall(rf"The magic number for {name} is (\d+)\. ", text)
        return np.asarray(self.codec.encode(" ".join(found)), np.int32)


@dataclasses.dataclass(frozen=True)
class LineRetrieval(TextTask):
    """Numbered lines with registers; one register is asked for (Ring Attention, 2310.01889)."""

    digits: int = 5

    @property
    def chance(self) -> float:
        """Guessing every digit."""
        return 0.1**self.digits

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """As many lines as fit; the rest is filler in front of them."""

        def line(number: int) -> str:
            return f"line {number:06d}: REGISTER_CONTENT is <{_digits(rng, self.digits)}>\n"

        ask = f"The REGISTER_CONTENT of line {0:06d} is <"
        size = len(self.codec.encode(line(0)))
        fixed = len(self.codec.encode(ask)) + self.digits + 8
        count = (length - fixed) // (size + size // 8)  # a tokenizer may need a few tokens more
        if count < 1:
            raise ValueError(f"{length=} must be at least {fixed + size + size // 8} for one line")
        numbers = rng.choice(1_000_000, count, replace=False)
        lines = [line(int(n)) for n in numbers]
        wanted = int(rng.integers(count))
        register = re.findall(r"<(\d+)>", lines[wanted])[0]
        ask = f"The REGISTER_CONTENT of line {int(numbers[wanted]):06d} is <"
        facts = [Fact(text, 1.0) for text in lines]
        episode = hide(self.codec, rng, length, facts, ask, register)
        return dataclasses.replace(episode, depth=wanted / max(1, count - 1))

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """The register of the line named in the question."""
        text = self.codec.decode(prompt.tolist())
        number = re.findall(r"of line (\d{6}) is <", text)[-1]
        register = re.findall(rf"^.*line {number}: REGISTER_CONTENT is <(\d+)>$", text, re.M)[0]
        return np.asarray(self.codec.encode(register), np.int32)


@dataclasses.dataclass(frozen=True)
class VariableTracking(TextTask):
    """Chains of assignments; name every variable that ends up with a value (RULER VT)."""

    chains: int = 2
    hops: int = 3

    def __post_init__(self) -> None:
        if self.chains < 1 or self.hops < 1 or self.chains * (self.hops + 1) > len(_NAMES):
            raise ValueError(
                f"chains={self.chains} and hops={self.hops} must be positive, with "
                f"chains * (hops + 1) at most {len(_NAMES)}"
            )

    @property
    def chance(self) -> float:
        """Guessing which names, in order."""
        names = np.arange(len(_NAMES), len(_NAMES) - self.hops - 1, -1)
        return float(1 / np.prod(names.astype(float)))

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """Chains interleaved at random depths, each in its own order."""
        names = rng.permutation(_NAMES)[: self.chains * (self.hops + 1)].reshape(self.chains, -1)
        values = rng.choice(np.arange(10_000, 100_000), self.chains, replace=False)
        facts = []
        for chain, value in zip(names, values, strict=True):
            depths = np.sort(rng.uniform(0, 1, self.hops + 1))
            sources = [str(value), *chain[:-1]]
            for name, source, depth in zip(chain, sources, depths, strict=True):
                facts.append(Fact(f"VAR {name} = {source}. ", float(depth)))
        ask = f"Question: which variables are {values[0]}? Answer: "
        return hide(self.codec, rng, length, facts, ask, " ".join(names[0]))

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """Follow the assignments from the value in the question."""
        text = self.codec.decode(prompt.tolist())
        value = re.findall(r"which variables are (\d+)\?", text)[-1]
        held = {value}
        order = []
        for name, source in re.findall(r"VAR (\w+) = (\w+)\. ", text):
            if source in held:
                held.add(name)
                order.append(name)
        return np.asarray(self.codec.encode(" ".join(order)), np.int32)


@dataclasses.dataclass(frozen=True)
class CommonWords(TextTask):
    """Words of which a few occur more often; name those alphabetically (RULER CWE)."""

    common: int = 3
    often: int = 6
    seldom: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.common < len(_NAMES) or not 0 < self.seldom < self.often:
            raise ValueError(
                f"common={self.common} must lie in [1, {len(_NAMES)}) and "
                f"seldom={self.seldom} below often={self.often}"
            )

    @property
    def chance(self) -> float:
        """Guessing which words."""
        ways = 1.0
        for i in range(self.common):
            ways *= (len(_NAMES) - i) / (i + 1)
        return 1 / ways

    def episode(self, rng: np.random.Generator, length: int) -> Episode:
        """Every other word occurs `seldom` times; the list is spread over the context."""
        words = [str(w) for w in rng.permutation(_NAMES)]
        wanted = sorted(words[: self.common])
        drawn = wanted * self.often + words[self.common :] * self.seldom
        order = rng.permutation(len(drawn))
        facts = [Fact(f"[{drawn[i]}] ", float(rank / len(drawn))) for rank, i in enumerate(order)]
        ask = f"Question: which {self.common} words in brackets are most common? Answer: "
        return hide(self.codec, rng, length, facts, ask, " ".join(wanted))

    def solve(self, prompt: np.ndarray) -> np.ndarray:
        """Count the words in brackets."""
        text = self.codec.decode(prompt.tolist())
        counts = Counter(re.findall(r"\[(\w+)\]", text))
        top = sorted(word for word, _ in counts.most_common(self.common))
        return np.asarray(self.codec.encode(" ".join(top)), np.int32)
