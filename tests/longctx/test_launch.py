"""How processes find each other: options, refusals, and the recipes of docs/launch."""

import os
import pathlib
import re
import shlex
import subprocess
import warnings

import jax
import pytest
import yaml

from longctx.cli import parse
from longctx.commands import TrainOptions, find_run
from longctx.errors import UserError
from longctx.launch import LaunchConfig, join
from tests.longctx.train.processes import ROOT

RECIPES = ROOT / "docs/launch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "host"}, "launch.coordinator=host must be host:port"),
        ({"processes": 2}, "need launch.coordinator"),
        ({"process": 0}, "need launch.coordinator"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "must be less than"),
        ({"patience": 0}, "launch.patience=0"),
    ],
)
def test_rules(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LaunchConfig(**options)


@pytest.fixture
def called(monkeypatch):
    """What `jax.distributed.initialize` is called with; it says that there is no cluster."""
    calls = []

    def initialize(*args, **options):
        calls.append((args, options))
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def test_no_cluster_means_one_process(called):
    join(LaunchConfig())
    join(LaunchConfig(detect=False))
    assert [args for args, _ in called] == [(None, None, None)]


def test_what_is_given_is_passed_on(called):
    with pytest.raises(UserError, match="cannot join the other processes"):
        join(LaunchConfig("here:1", 4, 3, patience=7))
    ((args, options),) = called
    assert args == ("here:1", 4, 3)
    assert set(options.values()) == {7}


def test_a_cluster_that_is_not_understood_is_an_error(monkeypatch):
    def initialize(*args, **options):
        raise RuntimeError("Kubernetes API Error: 403\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"Error: 403 \(one process alone: --launch.no-detect\)"):
        join(LaunchConfig())


def test_a_container_without_its_package_is_no_cluster(monkeypatch):
    def initialize(*args, **options):
        warnings.warn("Kubernetes environment detected, but", stacklevel=1)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    join(LaunchConfig())


def containers(recipe):
    """The containers of the pods that a Kubernetes recipe starts."""
    for document in yaml.safe_load_all((RECIPES / recipe).read_text()):
        spec = document["spec"]
        for job in [j["template"]["spec"] for j in spec.get("replicatedJobs", [])] or [spec]:
            yield from job.get("template", {}).get("spec", {}).get("containers", [])


@pytest.mark.parametrize(
    ("recipe", "devices"), [("gke_tpu.yaml", 2 * 16 * 4), ("kubernetes_gpu.yaml", 2 * 8)]
)
def test_kubernetes_recipes_start_a_run_on_all_their_devices(recipe, devices):
    (container,) = containers(recipe)
    assert container["command"][:2] == ["bash", "-c"]
    line = (
        container["command"][2].replace("$COORDINATOR", "a:1").replace("$JOB_COMPLETION_INDEX", "1")
    )
    exec_, longctx, train, name, *arguments = shlex.split(line)
    assert (exec_, longctx, train) == ("exec", "longctx", "train")
    options = parse(
        TrainOptions, "train", arguments, default=TrainOptions(find_run(name), pathlib.Path())
    )
    assert options.run.mesh.size == devices
    assert str(options.out).startswith(container["volumeMounts"][0]["mountPath"])
    if "gpu" in recipe:
        assert options.launch == LaunchConfig("a:1", 2, 1)


def test_tpu_pod_recipe_sends_its_arguments_whole(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(RECIPES / "tpu_pod.sh"), "tnl-1b", "--out", "/a b/c"]
    said = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": path, "TPU": "t", "ZONE": "z"}
    ).stdout.splitlines()
    assert said[4:7] == ["t", "--zone=z", "--worker=all"]
    sent = said[7].removeprefix("--command=")
    assert shlex.split(sent) == ["longctx", "train", "tnl-1b", "--out", "/a b/c"]
    refused = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    assert refused.returncode and "TPU: name of the TPU" in refused.stderr
