import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from longctx.errors import RunError
from longctx.models import ParallelConfig
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.train import loop
from longctx.train.directory import read_config
from longctx.train.loop import train
from longctx.train.metrics import read_metrics
from longctx.train.restore import load_run
from tests.golden.losses import GOLDEN, check_golden
from tests.longctx.train.runs import TNL, TRANSFORMER, tiny_run, write_run_file, write_text

THREE = dataclasses.replace(TNL.softmax, num_kv_heads=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """Twenty steps without a break."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_run(source, profile="2:3", trackers=("tensorboard",)), out)
    return out


def losses(out):
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r}


def checkpoints(out):
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir())


def test_what_a_run_leaves_behind(finished):
    records = read_metrics(finished / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    for record in steps:
        # The text is ASCII and the boundary stands once: a byte is a token, nearly.
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / np.log(2), rel=1e-3)
    assert steps[-1]["tokens_per_second"] > 0
    assert steps[-1]["mfu"] is None  # no peak is known for a CPU
    (held_out,) = [r for r in records if "valid_bits_per_byte" in r]
    assert held_out["step"] == 20
    assert abs(held_out["valid_bits_per_byte"] - steps[-1]["bits_per_byte"]) < 0.7
    assert checkpoints(finished) == [15, 20]  # the newest two
    assert (finished / "loss.png").stat().st_size > 5000
    assert list((finished / "profile").rglob("*.xplane.pb"))
    assert list((finished / "tensorboard").iterdir())


def test_golden_losses_of_tnl(finished):
    check_golden("tnl", losses(finished))


@pytest.mark.slow
def test_golden_losses_of_the_transformer(source, tmp_path):
    train(tiny_run(source, TRANSFORMER), tmp_path)
    check_golden("transformer", losses(tmp_path))


def test_golden_runs_differ():
    assert GOLDEN["tnl"] != GOLDEN["transformer"]


def test_killed_and_stopped_runs_resume_bitwise(source, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "broken"
    arguments = ["SIGKILL", "13", "train", write_run_file(tmp_path, source), "--out", str(out)]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.longctx.train.killed", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(losses(out)) in (11, 12)

    put_batch, calls = loop.put_batch, 0

    def put_and_terminate(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*args)

    monkeypatch.setattr(loop, "put_batch", put_and_terminate)
    with pytest.raises(SystemExit) as stopped:
        train(tiny_run(source), out)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    last = checkpoints(out)[-1]
    assert last in (8, 13)  # three steps after the checkpoint that the kill left behind
    assert f"stopped by a signal after step {last}" in capsys.readouterr().out

    train(tiny_run(source), out)
    assert f"after step {last}" in capsys.readouterr().out
    assert losses(out) == losses(finished)  # bit for bit
    assert len(read_metrics(out / "metrics.jsonl")) == len(read_metrics(finished / "metrics.jsonl"))


def test_a_finished_run_stays_as_it_is(source, finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    train(tiny_run(source), finished)
    assert "after step 20" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_run_loads_onto_another_mesh(finished):
    alone, sharded = load_run(finished), load_run(finished, make_mesh(data=2, fsdp=4))
    assert alone.step == sharded.step == 20
    pairs = zip(jax.tree.leaves(alone.params), jax.tree.leaves(sharded.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert any(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(sharded.params))


def damage(checkpoint, pattern):
    """Cut every file that matches to half its size."""
    files = [p for p in checkpoint.rglob(pattern) if p.is_file() and p.stat().st_size > 1]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("pattern", ["*", "d/*", "manifest.ocdbt", "_METADATA", "data/metadata"])
def test_truncated_checkpoint_is_skipped(source, finished, tmp_path, capsys, pattern):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damage(out / "checkpoints" / "20", pattern)
    half = out / "checkpoints" / "25.orbax-checkpoint-tmp"
    half.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "steps", lambda self, stop: None)
        train(tiny_run(source), out)
    said = capsys.readouterr().out
    assert "20: it cannot be read" in said
    assert f"{half.name}: half-written" in said
    assert "after step 15" in said
    assert max(losses(out)) == 15


def test_no_good_checkpoint_is_an_error(source, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (15, 20):
        damage(out / "checkpoints" / str(step), "*")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        train(tiny_run(source), out)
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        load_run(out)


def test_another_run_in_the_same_directory_is_an_error(source, finished):
    config = tiny_run(source)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=1))
    with pytest.raises(RunError, match=r"data\.seed 0 -> 1"):
        train(other, finished)


def test_a_start_that_fails_may_be_corrected(source, tmp_path, monkeypatch, capsys):
    def fail(self, stop):
        raise RunError("out of memory")

    monkeypatch.setattr(loop._Run, "steps", fail)
    for config in (tiny_run(source), tiny_run(source, TRANSFORMER)):
        with pytest.raises(RunError, match="out of memory"):
            train(config, tmp_path)
        assert read_config(tmp_path) == config
    said = capsys.readouterr().out
    assert "checkpoints in" in said and "loss curve" not in said  # nothing was recorded


@pytest.mark.parametrize(
    ("model", "axes", "message"),
    [
        (TNL, {"data": 16}, "needs 16 devices"),
        (dataclasses.replace(TNL, mixers=("softmax",), softmax=THREE), {}, "num_kv_heads=3 must"),
    ],
)
def test_what_cannot_be_built_is_a_clear_error(source, tmp_path, model, axes, message):
    config = dataclasses.replace(tiny_run(source, model), mesh=MeshConfig(**axes))
    with pytest.raises(RunError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rule_found_as_the_step_is_traced_is_a_clear_error(source, tmp_path):
    parallel = ParallelConfig(strategy="ulysses")
    config = dataclasses.replace(
        tiny_run(source, TRANSFORMER), mesh=MeshConfig(seq=4), parallel=parallel
    )
    with pytest.raises(RunError, match=r"2 query and 2 key/value heads cannot be dealt to 4"):
        train(config, tmp_path)
