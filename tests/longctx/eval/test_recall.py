"""Scoring a model on tasks: a model that sees the answers is right, one that does not is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import UserError
from longctx.eval.recall import Answerer, evaluate_tasks, score_task
from longctx.parallel.mesh import make_mesh
from longctx.tasks import TASKS, MultiQueryRecall


class Peeking(nnx.Module):
    """Its hidden vector is the one-hot of the token `ahead` positions later."""

    def __init__(self, ahead: int):
        self.ahead = ahead
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, tokens):
        return jax.nn.one_hot(jnp.roll(tokens, -self.ahead, axis=1), 256) * self.scale

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("name", TASKS)
def test_scores_of_a_perfect_and_of_a_blind_model(name):
    mesh = make_mesh()
    for ahead, expected in ((1, 1.0), (0, 0.0)):
        answerer = Answerer(*nnx.split(Peeking(ahead), nnx.Param, ...), mesh)
        assert score_task(answerer, TASKS[name], 1500, 13) == pytest.approx(expected, abs=0.1)


def test_episodes_may_have_answers_of_different_lengths():
    answerer = Answerer(*nnx.split(Peeking(1), nnx.Param, ...), make_mesh())
    task = MultiQueryRecall(pairs=2)
    batch = [task.episode(np.random.default_rng(i), 16) for i in range(3)]
    for episode, predicted in zip(batch, answerer(batch), strict=True):
        np.testing.assert_array_equal(predicted[episode.answer], episode.tokens[episode.answer])


def test_unknown_task(tmp_path):
    with pytest.raises(UserError, match="unknown tasks haystack; there are needle"):
        evaluate_tasks(tmp_path, ["haystack"], [64])
