"""Two processes of two CPU devices each are one run: losses as of one process with four devices."""

import dataclasses
import re
import shutil
import signal
import time

import numpy as np
import pytest

from longctx.parallel.mesh import MeshConfig
from longctx.train.loop import train
from longctx.train.metrics import read_metrics
from tests.longctx.train.processes import ROOT, finish, free_port, start, start_pair
from tests.longctx.train.runs import tiny_run, write_run_file, write_text

STEPS = {"steps": 6, "checkpoint_every": 3}
SHORT = ["--train.steps", "6", "--train.checkpoint-every", "3"]
MESH = ["--mesh.data", "2", "--mesh.seq", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """Losses of one process with four devices."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(dataclasses.replace(tiny_run(source, **STEPS), mesh=MeshConfig(data=2, seq=2)), out)
    return losses(out)


def losses(out):
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def by_slurm(source, tmp_path_factory):
    """The SLURM recipe under an `srun` that starts two tasks on this machine."""
    directory = tmp_path_factory.mktemp("slurm")
    srun = directory / "srun"
    srun.write_text(
        f"""#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 JAX_COORDINATOR_PORT={free_port()}
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[task]=$!
done
wait "${{tasks[0]}}" && wait "${{tasks[1]}}"
"""
    )
    srun.chmod(0o755)
    out = directory / "run"
    recipe = ["bash", str(ROOT / "docs/launch/slurm.sh"), write_run_file(directory, source)]
    command = [*recipe, "--out", str(out), *MESH, *SHORT]
    code, said = finish(start(command, also_on_path=str(directory), SLURM_JOB_ID="7"))
    assert code == 0, said
    return out, said


def test_the_slurm_recipe_trains_as_one_process_does(by_slurm, alone):
    out, said = by_slurm
    assert said.count("4 cpu device(s)") == 1  # told by the first process, of all devices
    assert len(alone) == 6
    np.testing.assert_allclose(list(losses(out).values()), list(alone.values()), rtol=1e-6)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.slow)]
)
def test_its_checkpoint_goes_on_in_one_process_and_on_another_mesh(
    by_slurm, alone, source, mesh, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(by_slurm[0], out)
    shutil.rmtree(out / "checkpoints" / "6")
    train(dataclasses.replace(tiny_run(source, **STEPS), mesh=mesh), out)
    np.testing.assert_allclose(list(losses(out).values()), list(alone.values()), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("hit", [0, 1])
def test_one_killed_ends_the_other_and_a_restart_resumes_exactly(source, tmp_path, hit):
    run = [write_run_file(tmp_path, source), "--mesh.data", "4", "--train.steps", "14"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert [finish(p)[0] for p in start_pair(*run, "--out", str(unbroken))] == [0, 0]

    pair = start_pair(*run, "--out", str(broken), "--launch.patience", "10", hit=hit, step=13)
    assert finish(pair[hit])[0] == -signal.SIGKILL
    began = time.monotonic()
    code, said = finish(pair[1 - hit])
    assert time.monotonic() - began < 30
    assert code not in (0, None) and "another task died" in said

    again = [finish(p) for p in start_pair(*run, "--out", str(broken))]
    assert [code for code, _ in again] == [0, 0], again
    assert re.search("going on after step (5|10)", again[0][1])  # 10 may be half-written
    assert losses(broken) == losses(unbroken)  # bit for bit


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(source, tmp_path):
    run = [write_run_file(tmp_path, source), *MESH, "--out", str(tmp_path / "run")]
    ends = [finish(p) for p in start_pair(*run, by="SIGTERM", step=7)]
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    assert ends[0][1].count("stopped by a signal after step") == 1
    stopped = max(losses(tmp_path / "run"))
    assert 7 <= stopped < 20
    ends = [finish(p) for p in start_pair(*run)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"going on after step {stopped}" in ends[0][1]
    assert max(losses(tmp_path / "run")) == 20
