"""Every task: an oracle that reads the context scores 1, a guess scores chance, episodes repeat."""

import itertools

import numpy as np
import pytest

from longctx.data.tokenizer import load_tokenizer
from longctx.tasks import (
    TASKS,
    CommonWords,
    Copying,
    Episode,
    Induction,
    LineRetrieval,
    MultiQueryRecall,
    Needle,
    TextCodec,
    TextTask,
    VariableTracking,
    answer_spans,
    episodes,
    named_task,
    score,
)
from tests.longctx.data.test_tokenizer import byte_level

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


SMALL = {  # versions of which a guess is right often enough to be counted
    "needle": (Needle(digits=1), 120),
    "multi-key": (Needle(digits=1, keys=4), 300),
    "multi-value": (Needle(digits=1, values=2), 200),
    "lines": (LineRetrieval(digits=1), 200),
    "variables": (VariableTracking(chains=1, hops=1), 120),
    "common-words": (CommonWords(common=1, often=3, seldom=1), 400),
    "mqar": (MultiQueryRecall(pairs=2, vocab_size=8), 32),
    "induction": (Induction(vocab_size=5), 32),
}


@pytest.mark.parametrize("name", SMALL)
def test_chance_is_what_a_constant_answer_scores(name):
    """Neither more nor less: within four standard errors over two thousand episodes."""
    task, length = SMALL[name]
    sample = list(itertools.islice(episodes(task, length=length), 2000))
    answer = next(e.tokens[e.answer] for e in sample[7:])
    same_length = [e for e in sample if e.answer.sum() == answer.size]
    scores = []
    for episode in same_length:
        predicted = np.full(length, -1)
        predicted[episode.answer] = answer
        scores.append(score(episode, predicted))
    mean = np.sum(scores) / len(sample)
    assert abs(mean - task.chance) < 4 * np.sqrt(task.chance / len(sample))


def test_nobody_copies_by_chance():
    """Copying at its shortest: two symbols, three of them in a row, one in eight."""
    task = Copying(vocab_size=3)
    sample = list(itertools.islice(episodes(task, length=7), 2000))
    right = np.mean([np.array_equal(e.tokens[e.answer], [1, 2, 1]) for e in sample])
    assert abs(right - 1 / 8) < 0.03
    assert task.chance == 0  # what it tends to at any length of use


def test_needle_stands_at_its_depth():
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = Needle(depth=depth)
        episode = next(episodes(task, length=4000))
        place = bytes(episode.tokens.tolist()).decode().index("The magic number")
        assert episode.depth == depth
        assert abs(place / 4000 - depth) < 0.06


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if isinstance(task, TextTask)])
def test_text_tasks_in_a_tokenizers_tokens(name, tmp_path):
    path = byte_level(tmp_path / "t.json", ["<|endoftext|>"])
    task = named_task(name, TextCodec.named(path))
    assert task.vocab_size == load_tokenizer(path).vocab_size
    for episode in itertools.islice(episodes(task, length=1200), 3):
        (span,) = answer_spans(episode.answer)
        solved = task.solve(episode.tokens[: span.start])
        np.testing.assert_array_equal(solved, episode.tokens[span])
        in_bytes = next(episodes(TASKS[name], length=1200)).tokens
        assert not np.array_equal(episode.tokens, in_bytes)


@pytest.mark.parametrize("name", TASKS)
def test_tokens_are_below_the_vocabulary_size(name):
    assert max(e.tokens.max() for e in take(name, 5)) < TASKS[name].vocab_size


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
    with pytest.raises(ValueError, match="unknown task haystack; there are needle"):
        named_task("haystack")
