"""From one model to another: adapted runs, Hugging Face folders, tasks as data and as tests."""

import dataclasses
import pathlib

import numpy as np
import pytest

from longctx.cli import main
from longctx.data.config import DataConfig
from longctx.errors import RunError, UserError
from longctx.models import MODELS, LightningConfig, MlpConfig, SoftmaxConfig
from longctx.models.layers import by_layer
from longctx.parallel.mesh import make_mesh
from longctx.provenance import read_rows
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
from longctx.train.directory import read_config
from longctx.train.initial import begin_with, run_from_hf, run_to_hf
from longctx.train.loop import train
from longctx.train.restore import load_run
from longctx.train.step import create_state

MODEL = dataclasses.replace(
    MODELS["transformer-tiny"],
    width=32,
    num_layers=2,
    softmax=SoftmaxConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    lightning=LightningConfig(num_heads=2, head_dim=16),
    mlp=MlpConfig(width=48, activation="silu"),
)
RUN = RunConfig(
    model=MODEL,
    data=DataConfig(source="task:mqar", sequence_length=64, batch_size=4),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=256),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A run of two steps on associative recall."""
    out = tmp_path_factory.mktemp("runs") / "source"
    train(RUN, out)
    return out


def test_only_answers_of_a_task_are_targets(trained):
    first = read_rows(trained / "metrics.jsonl")[0]
    assert abs(first["loss"] - np.log(MODEL.vocab_size)) < 1  # of an untrained model, per answer


def test_adapting_takes_what_both_models_have(trained):
    """Softmax to lightning in one layer of two: the other layer and all MLPs are taken."""
    hybrid = dataclasses.replace(MODEL, mixers=("lightning", "softmax"))
    mesh = make_mesh()
    config = dataclasses.replace(RUN, model=hybrid)
    state, fresh = begin_with(create_state(config, mesh), config, trained, mesh)
    given, taken = by_layer(MODEL, load_run(trained).params), by_layer(hybrid, state.params)
    assert {name.rpartition(".")[0] for name in fresh} == {
        "layers.0.mixer.project",
        "layers.0.mixer.lrpe",
    }
    for path in set(given) & set(taken):
        np.testing.assert_array_equal(taken[path], given[path])
    assert ("layers", 1, "mixer", "query", "kernel") in set(given) & set(taken)


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ("--model.mixers tensorized --model.tensorized.dims 16 None", "tensorized tensorized"),
        ("--model.mixers lightning softmax", "lightning+lrpe softmax"),
        pytest.param(
            "--model.mixers window --model.softmax.window 16",
            "window window",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--mesh.seq 2 --parallel.strategy ring", "softmax softmax", marks=pytest.mark.slow
        ),
    ],
)
def test_adapt_command_trains_on_with_another_attention(trained, tmp_path, arguments, wanted):
    """From a Hugging Face folder: swapped, trained, scored at and beyond the trained length."""
    main(["convert", str(trained), "--out", str(tmp_path / "hf")])
    out = tmp_path / "adapted"
    shape = "--data.source task:mqar --data.sequence-length 64 --data.batch-size 4"
    schedule = "--optim.warmup-steps 1 --train.steps 3 --train.log-every 1 --eval.tokens 256"
    given = f"{arguments} {shape} {schedule} --out {out}"
    main(["adapt", str(tmp_path / "hf"), *given.split()])
    config = read_config(out)
    assert config.model.layer_kinds() == tuple(wanted.split())
    losses = [r["loss"] for r in read_rows(out / "metrics.jsonl") if "loss" in r]
    assert len(losses) == 3 and np.isfinite(losses).all()
    main(["eval", str(out), "--lengths", "64,128", "--tokens", "256"])
    assert [r["length"] for r in read_rows(out / "eval.jsonl")] == [64, 128]


def test_other_shapes_are_refused(trained):
    wide = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, mlp=MlpConfig(width=64)))
    mesh = make_mesh()
    with pytest.raises(RunError, match="cannot begin with"):
        begin_with(create_state(wide, mesh), wide, trained, mesh)


def test_convert_command_to_hugging_face_and_back(trained, tmp_path):
    main(["convert", str(trained), "--out", str(tmp_path / "hf")])
    main(["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "back")])
    there, back = load_run(trained), load_run(tmp_path / "back")
    given, got = by_layer(MODEL, there.params), by_layer(MODEL, back.params)
    assert given.keys() == got.keys()
    for path, value in given.items():
        np.testing.assert_array_equal(got[path], value)


def test_convert_spares_what_is_there(trained, tmp_path):
    file, before = tmp_path / "file", (trained / "config.json").read_text()
    file.touch()
    for out, message in ((trained, "has the config.json of a run"), (file, "is a file")):
        with pytest.raises(RunError, match=message):
            run_to_hf(trained, out)
    assert (trained / "config.json").read_text() == before
    run_to_hf(trained, tmp_path / "hf")
    with pytest.raises(RunError, match="already has a checkpoint"):
        run_from_hf(tmp_path / "hf", trained)


def test_eval_tasks_command(trained, capsys):
    arguments = ["--tasks", "mqar,needle", "--lengths", "128", "--episodes", "3"]
    main(["eval", str(trained), *arguments])
    rows = read_rows(trained / "tasks.jsonl")
    assert {r["task"] for r in rows} == {"mqar", "needle"}
    assert {r["depth"] for r in rows if r["task"] == "needle"} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (trained / "tasks.png").stat().st_size > 1000
    assert "needle" in capsys.readouterr().out


def test_unknown_task_is_one_clear_error(tmp_path):
    nothing = dataclasses.replace(RUN.data, source="task:nothing")
    with pytest.raises(UserError, match="there are needle"):
        train(dataclasses.replace(RUN, data=nothing), tmp_path / "x")
