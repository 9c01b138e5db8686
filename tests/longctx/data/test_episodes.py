"""Tasks as training data: episodes fill sequences, or several short ones are packed into each."""

import numpy as np
import pytest

from longctx.data.config import DataConfig, DataError
from longctx.data.episodes import load_episodes, shorter
from longctx.tasks import Needle, named_task
from longctx.tasks.episode import episode_at


def rows(source, length):
    config = DataConfig(source=f"task:{source}", sequence_length=length)
    return load_episodes(config, "train", vocab_size=257).windows(length)


def test_tasks_take_turns():
    found = rows("mqar+induction", 64)
    for index, name in enumerate(("mqar", "induction")):
        episode = episode_at(named_task(name), index, length=65, seed=0, split="train")
        np.testing.assert_array_equal(found[index]["tokens"], episode.tokens[:-1])
        answers = np.where(episode.answer, episode.tokens, -1)[1:]
        np.testing.assert_array_equal(found[index]["targets"], answers)
        assert not found[index]["doc_start"].any()


def test_short_episodes_are_packed_as_documents():
    row = rows("mqar-often@40", 100)[0]
    np.testing.assert_array_equal(row["doc_start"], [0] * 40 + [40] * 60)  # 20 are left over
    np.testing.assert_array_equal(row["positions"], [*range(40), *range(60)])
    assert (row["targets"][80:] == -1).all()
    first, second = row["tokens"][:40], row["tokens"][40:80]
    assert (first != second).any()
    for start in (0, 40):
        answered = np.flatnonzero(row["targets"][start : start + 39] >= 0)
        assert len(answered)
        tokens = row["tokens"][start : start + 40]
        for at in answered:  # a key's target is the value that stands behind it
            assert tokens[at + 1] == row["targets"][start + at]


def test_shorter_episodes_leave_room_for_eight_pairs():
    assert shorter("mqar", 512) == ("mqar@64", "mqar@128", "mqar@256")
    assert shorter("mqar", 64) == ("mqar@32",)
    assert (rows("+".join(shorter("mqar-often", 64)), 64)[0]["targets"] >= 0).sum() == 16


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("mqar@65", "episodes of 65 tokens must fit in sequences of 64"),
        ("mqar@", "mqar@ must have a positive number of tokens behind @"),
        ("mqar@-1", "positive number"),
        ("mqar@8", "length=9 must be at least 32"),
        ("nothing@8", "unknown task nothing"),
    ],
)
def test_bad_sources_are_refused(source, reason):
    with pytest.raises(DataError, match=reason):
        rows(source, 64)


def test_needles_stand_nearest_to_their_depth():
    for depth, low, high in ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)):
        task = Needle(depth=depth)
        for index in range(20):
            episode = episode_at(task, index, length=600, seed=0, split="test")
            text = task.codec.decode(episode.tokens.tolist())
            at = text.index("The magic")
            room = text.index("Question") - (text.index(". ", at) + 2 - at)
            assert low <= at / room <= high
