"""A run whose sequences are split over devices takes the same steps as on one device."""

import dataclasses

import numpy as np
import pytest

from longctx.cli import parse
from longctx.commands import TrainOptions
from longctx.data.config import DataConfig
from longctx.eval.lengths import evaluate
from longctx.models import MODELS, LightningConfig, MlpConfig, SoftmaxConfig
from longctx.models.config import ParallelConfig
from longctx.parallel.mesh import MeshConfig
from longctx.provenance import read_rows
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
from longctx.train.loop import train

HYBRID = RunConfig(
    model=dataclasses.replace(
        MODELS["hybrid-tiny"],
        width=32,
        num_layers=2,
        lightning=LightningConfig(num_heads=2, head_dim=16),
        softmax=SoftmaxConfig(num_heads=2, num_kv_heads=2, head_dim=16),
        mlp=MlpConfig(width=48),
    ),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=256),
)


def losses(config: RunConfig, out) -> list[float]:
    train(config, out)
    rows = read_rows(out / "metrics.jsonl")
    return [r[name] for r in rows for name in ("loss", "valid_bits_per_byte") if name in r]


@pytest.mark.parametrize("strategy", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_losses_equal_those_of_one_device(strategy, tmp_path):
    parallel = ParallelConfig(strategy=strategy, layout="zigzag")
    mesh = MeshConfig(seq=2, tensor=2)
    sharded = dataclasses.replace(HYBRID, mesh=mesh, parallel=parallel)
    one, several = losses(HYBRID, tmp_path / "one"), losses(sharded, tmp_path / "several")
    assert len(one) == 3
    np.testing.assert_allclose(several, one, rtol=1e-5)
    (whole,) = evaluate(tmp_path / "several", [64], tokens=256)
    (split,) = evaluate(tmp_path / "several", [64], tokens=256, mesh=MeshConfig(seq=2))
    np.testing.assert_allclose([whole.bits_per_byte, split.bits_per_byte], one[-1], rtol=1e-5)


def test_a_run_with_usp_is_scored_on_other_meshes(tmp_path):
    usp = ParallelConfig(strategy="usp", layout="zigzag", ranks=2)
    model = dataclasses.replace(HYBRID.model, mixers=("softmax",), num_layers=1)
    run = dataclasses.replace(HYBRID, model=model, mesh=MeshConfig(seq=4), parallel=usp)
    trained = losses(run, tmp_path)
    for seq in (1, 2):
        (score,) = evaluate(tmp_path, [64], tokens=256, mesh=MeshConfig(seq=seq))
        np.testing.assert_allclose(score.bits_per_byte, trained[-1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("lightning",), ("softmax",), ("lightning", "softmax")])
def test_two_options_split_the_sequences_of_any_model(mixers, tmp_path):
    run = dataclasses.replace(HYBRID, model=dataclasses.replace(HYBRID.model, mixers=mixers))
    given = ["--mesh.seq", "4", "--parallel.strategy", "ring"]
    split = parse(TrainOptions, "train", given, default=TrainOptions(run, tmp_path)).run
    assert split.mesh.seq == 4 and split.parallel.strategy == "ring"
    one, four = losses(run, tmp_path / "one"), losses(split, tmp_path / "four")
    np.testing.assert_allclose(four, one, rtol=1e-5)


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="sequence_length=64 must divide by mesh"):
        dataclasses.replace(HYBRID, mesh=MeshConfig(seq=3))
    with pytest.raises(ValueError, match="two chunks a rank"):
        data = dataclasses.replace(HYBRID.data, sequence_length=12)
        zigzag = ParallelConfig(layout="zigzag")
        dataclasses.replace(HYBRID, data=data, mesh=MeshConfig(seq=4), parallel=zigzag)
