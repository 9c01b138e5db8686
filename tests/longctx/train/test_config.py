import dataclasses
import json

import pytest

from longctx.configs import RUNS
from longctx.data.config import DataConfig
from longctx.models import MODELS
from longctx.parallel.mesh import MeshConfig
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
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
