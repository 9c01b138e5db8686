"""Scoring a model on tasks: a model that sees the answers is right, one that does not is not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.commands import evaluate
from longctx.data.config import DataConfig, DataError
from longctx.data.pipeline import load_corpus
from longctx.data.tokenizer import load_tokenizer
from longctx.errors import UserError
from longctx.eval.recall import Answerer, evaluate_tasks, score_task
from longctx.parallel.mesh import make_mesh
from longctx.tasks import TASKS, MultiQueryRecall
from longctx.train.loop import train
from tests.longctx.data.test_tokenizer import byte_level
from tests.longctx.train.runs import TRANSFORMER, tiny_run


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps on MQAR."""
    run = tmp_path_factory.mktemp("mqar") / "run"
    config = tiny_run("task:mqar", TRANSFORMER, steps=4)
    train(
        dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=40)), run
    )
    return run


def test_one_command_from_a_run_to_rows_and_picture(trained, capsys):
    options = ["--tasks", "needle,mqar", "--lengths", "150,400", "--episodes", "3"]
    evaluate([str(trained), *options])
    rows = [json.loads(line) for line in (trained / "tasks.jsonl").read_text().splitlines()]
    assert [(r["task"], r["length"]) for r in rows if r["depth"] is None] == [
        ("mqar", 150), ("mqar", 400),
    ]  # fmt: skip
    cells = [(r["length"], r["depth"]) for r in rows if r["task"] == "needle"]
    assert cells == [(n, d) for n in (150, 400) for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(0 <= r["accuracy"] <= 1 and r["train_length"] == 40 for r in rows)
    assert {"step", "chance", "episodes", "commit", "device", "versions"} <= rows[0].keys()
    assert (trained / "tasks.png").stat().st_size > 1000
    assert "accuracy by length" in capsys.readouterr().out


def test_two_devices_score_like_one(trained):
    def scores(name, *options):
        evaluate([str(trained), "--lengths", "64,128", *options])
        rows = [json.loads(line) for line in (trained / name).read_text().splitlines()]
        return [r.get("accuracy", r.get("bits_per_byte")) for r in rows]

    mesh = ("--mesh.seq", "2")
    tasks = ("--tasks", "mqar,induction", "--episodes", "8")
    assert scores("tasks.jsonl", *tasks, *mesh) == scores("tasks.jsonl", *tasks)
    text = ("--tokens", "1024")
    found, expected = scores("eval.jsonl", *text, *mesh), scores("eval.jsonl", *text)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_devices_must_divide_the_lengths(trained, capsys):
    with pytest.raises(SystemExit):
        evaluate([str(trained), "--tasks", "mqar", "--lengths", "64,129", "--mesh.seq", "2"])
    assert "lengths=64,129: mesh.seq=2 must divide 129" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--tasks", "mqar"]])
def test_a_mesh_of_more_devices_than_there_are(trained, options):
    with pytest.raises(UserError, match="needs 16 devices, there are 8"):
        evaluate([str(trained), "--lengths", "64", "--mesh.seq", "16", *options])


@pytest.mark.parametrize(
    ("names", "length", "message"),
    [
        (["haystack"], 64, "unknown tasks haystack; there are needle"),
        (["needle"], 64, "task needle: length=64 must be at least"),
    ],
)
def test_what_cannot_be_measured_loses_nothing(trained, names, length, message):
    (trained / "tasks.jsonl").write_text("kept")
    with pytest.raises(UserError, match=message):
        evaluate_tasks(trained, names, [length])
    assert (trained / "tasks.jsonl").read_text() == "kept"


def test_a_task_with_more_tokens_than_the_model_is_refused():
    config = tiny_run("task:mqar-64", dataclasses.replace(TRANSFORMER, vocab_size=200))
    with pytest.raises(DataError, match=r"needs model\.vocab_size=200 to be at least 256"):
        load_corpus(config.data, "train", vocab_size=config.model.vocab_size)


def test_a_text_task_is_trained_in_the_runs_tokens(tmp_path):
    path = byte_level(tmp_path / "t.json", ["<|endoftext|>"])
    config = DataConfig(source="task:needle", tokenizer=path, sequence_length=199)
    example = load_corpus(config, "train", vocab_size=300).windows(199)[0]
    text = load_tokenizer(path).decode(example["tokens"].tolist())
    assert "The magic number for" in text
    answer = load_tokenizer(path).decode(example["targets"][example["targets"] >= 0].tolist())
    assert answer.isdigit() and len(answer) == 7
