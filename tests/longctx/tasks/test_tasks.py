"""Every task: an oracle that reads the context scores 1, a guess scores chance, episodes repeat."""

import itertools

import numpy as np
import pytest

from longctx.tasks import (
    TASKS,
    Episode,
    Induction,
    LineRetrieval,
    MultiQueryRecall,
    Needle,
    TextCodec,
    answer_spans,
    episodes,
    score,
)

LENGTH = 1500


def take(name: str, count: int, **options) -> list[Episode]:
    return list(itertools.islice(episodes(TASKS[name], length=LENGTH, **options), count))


@pytest.mark.parametrize("name", TASKS)
def test_oracle_scores_one(name):
    for episode in take(name, 5):
        predicted = np.full(LENGTH, -1)
        for span in answer_spans(episode.answer):
            predicted[span] = TASKS[name].solve(episode.tokens[: span.start])
        assert score(episode, predicted) == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_shapes_and_determinism(name):
    first, second = take(name, 3), take(name, 3)
    for a, b in zip(first, second, strict=True):
        assert a.tokens.shape == a.answer.shape == (LENGTH,)
        assert a.tokens.dtype == np.int32
        assert a.answer.any()
        np.testing.assert_array_equal(a.tokens, b.tokens)
    train = take(name, 3, split="train")
    assert all((a.tokens != b.tokens).any() for a, b in zip(first, train, strict=True))
    assert (first[0].tokens != first[1].tokens).any()
    later = take(name, 1, start=2)
    np.testing.assert_array_equal(later[0].tokens, first[2].tokens)


@pytest.mark.parametrize("name", TASKS)
def test_a_constant_answer_scores_chance(name):
    """The best constant (the answer of another episode) is right with probability `chance`."""
    sample = take(name, 40)
    constant = sample[0].tokens
    guesses = []
    for episode in sample[1:]:
        predicted = np.full(LENGTH, -1)
        spans = answer_spans(episode.answer)
        for span, source in zip(spans, answer_spans(sample[0].answer), strict=False):
            if span.stop - span.start == source.stop - source.start:
                predicted[span] = constant[source]
        guesses.append(score(episode, predicted))
    assert np.mean(guesses) <= TASKS[name].chance + 3 * np.sqrt(TASKS[name].chance / 39) + 1e-9


@pytest.mark.parametrize("task", [MultiQueryRecall(pairs=2, vocab_size=8), Induction(vocab_size=5)])
def test_chance_is_exact_where_it_can_be_measured(task):
    guess = task.vocab_size - 1
    sample = itertools.islice(episodes(task, length=32), 2000)
    mean = np.mean([score(e, np.full(32, guess)) for e in sample])
    assert abs(mean - task.chance) < 4 * np.sqrt(task.chance / 2000)


def test_needle_stands_at_its_depth():
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = Needle(depth=depth)
        episode = next(episodes(task, length=4000))
        place = bytes(episode.tokens.tolist()).decode().index("The magic number")
        assert episode.depth == depth
        assert abs(place / 4000 - depth) < 0.06


def test_a_tokenizer_mode():
    words = {}

    def encode(text):
        return [
            words.setdefault(w, len(words)) for w in __import__("re").findall(r"\s|\w+|\W", text)
        ]

    def decode(tokens):
        names = list(words)
        return "".join(names[t] for t in tokens)

    codec = TextCodec(encode=encode, decode=decode)
    for task in (Needle(codec=codec), LineRetrieval(codec=codec)):
        episode = next(episodes(task, length=400))
        (span,) = answer_spans(episode.answer)
        solved = task.solve(episode.tokens[: span.start])
        np.testing.assert_array_equal(solved, episode.tokens[span])


@pytest.mark.parametrize("name", TASKS)
def test_too_short_is_one_clear_error(name):
    with pytest.raises(ValueError, match="length=2 must be at least"):
        TASKS[name].episode(np.random.default_rng(0), 2)


def test_bad_arguments():
    with pytest.raises(ValueError, match="split='dev' must be one of"):
        next(episodes(TASKS["mqar"], length=64, split="dev"))
    with pytest.raises(ValueError, match="vocab_size=8 must be at least 18"):
        MultiQueryRecall(pairs=8, vocab_size=8)
    with pytest.raises(ValueError, match="depth=2"):
        Needle(depth=2)
