import dataclasses
import json

import pytest

from longctx.configs import RUNS
from longctx.data.config import DataConfig
from longctx.models import MODELS
from longctx.parallel.mesh import MeshConfig
from longctx.train.config import (
    EvalConfig,
    OptimConfig,
    RunConfig,
    RunError,
    TrainConfig,
    check_directory,
    read_config,
    write_config,
)
from longctx.train.serialize import from_json, to_json


@pytest.mark.parametrize("model", MODELS)
def test_every_model_survives_json(model):
    config = RunConfig(model=MODELS[model], train=TrainConfig(trackers=("wandb", "tensorboard")))
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_every_named_run_survives_json():
    for config in RUNS.values():
        assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


@dataclasses.dataclass(frozen=True)
class Left:
    value: int = 1


@dataclasses.dataclass(frozen=True)
class Right:
    value: int = 1


@dataclasses.dataclass(frozen=True)
class Holder:
    side: Left | Right | None = None
    pair: tuple[int, float] = (1, 2.0)


@pytest.mark.parametrize("side", [Left(2), Right(2), None])
def test_unions_keep_their_class(side):
    held = Holder(side, (3, 4.5))
    assert from_json(Holder, to_json(held)) == held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": [1]}, "pair=.* must have 2 entries"),
        ({"pair": ["1", 2.0]}, r"pair\[0\]='1' must be of type int"),
        ({"side": 3}, "side=3 fits none of"),
        ({"other": 3}, "other: Holder has no such field"),
    ],
)
def test_json_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Holder, to_json(Holder()) | change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "train.steps=0"),
        (lambda: TrainConfig(profile="3"), "train.profile='3' must be FIRST:LAST"),
        (lambda: TrainConfig(profile="5:3"), "1 <= FIRST <= LAST <= 1000"),
        (lambda: OptimConfig(learning_rate=0), "optim.learning_rate=0 must be positive"),
        (lambda: OptimConfig(warmup_steps=-1), "optim.warmup_steps=-1"),
        (lambda: OptimConfig(beta2=1.0), r"optim.beta2=1.0 must lie in \[0, 1\)"),
        (lambda: EvalConfig(every=-1), "eval.every"),
        (lambda: DataConfig(valid_fraction=1), "data.valid_fraction=1"),
        (lambda: DataConfig(sequence_length=0), "data.sequence_length=0"),
        (lambda: RunConfig(MODELS["tnl-tiny"], mesh=MeshConfig(data=3)), "batch_size=32 must div"),
        (lambda: RunConfig(MODELS["tnl-tiny"], train=TrainConfig(steps=50)), "warmup_steps=100"),
        (lambda: RunConfig(MODELS["tnl-tiny"], mesh=MeshConfig(seq=3)), "must divide by mesh.seq"),
        (
            lambda: RunConfig(MODELS["gpt2-tiny"], DataConfig(sequence_length=4096)),
            "sequence_length=4096 exceeds model.learned_positions=1024",
        ),
    ],
)
def test_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_directory_belongs_to_one_run(tmp_path):
    config = RUNS["quickstart"]
    check_directory(config, tmp_path)
    assert not list(tmp_path.iterdir())
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=7))
    mlp = dataclasses.replace(config.model.mlp, width=64)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp=mlp))
    check_directory(wider, tmp_path)  # no checkpoint: nothing that another run could spoil
    (tmp_path / "checkpoints" / "200").mkdir(parents=True)
    check_directory(longer, tmp_path)
    with pytest.raises(RunError, match=r"\(model\.mlp\.width \d+ -> 64\)"):
        check_directory(wider, tmp_path)
    for change, message in (
        ({"init": "other"}, r"train\.init '' -> 'other'"),
        ({"seed": 7}, r"train\.seed 0 -> 7"),
        ({"steps": 199}, r"train\.steps=199 must be at least 200"),
    ):
        train = dataclasses.replace(config.train, **change)
        with pytest.raises(RunError, match=message):
            check_directory(dataclasses.replace(config, train=train), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file"):
        check_directory(config, tmp_path / "file")


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="model is missing"):
        read_config(tmp_path)
