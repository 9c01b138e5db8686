"""What `longctx plan` says of a step, beside what is known of it."""

import dataclasses
import importlib.util

import jax
import pytest

from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.models import ParallelConfig
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.parallel.overlap import Move
from longctx.plan import amount, collectives, report_of
from tests.longctx.train.runs import TRANSFORMER, tiny_run


def test_moves_are_summed_by_kind_and_axes():
    """On a mesh of data 2, fsdp 2, seq 2: device 4 d + 2 f + s."""
    mesh = make_mesh(data=2, fsdp=2, seq=2, devices=jax.devices()[:8])
    hidden = Move("all-gather", "a", 100, False, ("kernel",), times=3, devices=(0, 2))
    moves = [
        hidden,
        dataclasses.replace(hidden, name="b", hidden_by=(), times=2, devices=(5, 7)),
        Move("all-reduce", "c", 10, True, (), devices=(1, 3, 5, 7)),
        Move("collective-permute", "d", 1, False, (), devices=(6, 7)),
        Move("all-reduce", "e", 5, True, ()),  # of whom, the program does not say
    ]
    assert collectives(moves, mesh) == [
        {"kind": "all-gather", "axes": "fsdp", "count": 5, "bytes": 500}
        | {"exposed": 2, "exposed_bytes": 200},
        {"kind": "all-reduce", "axes": "data+fsdp", "count": 1, "bytes": 10}
        | {"exposed": 1, "exposed_bytes": 10},
        {"kind": "all-reduce", "axes": "?", "count": 1, "bytes": 5}
        | {"exposed": 1, "exposed_bytes": 5},
        {"kind": "collective-permute", "axes": "seq", "count": 1, "bytes": 1}
        | {"exposed": 1, "exposed_bytes": 1},
    ]


def test_amounts_have_the_unit_of_their_size():
    assert amount(0, "B") == "0 B"
    assert amount(999, "B") == "999 B"
    assert amount(1000, "B") == "1.00 kB"
    assert amount(34_567_890, " parameters", billion="B") == "34.6 M parameters"
    assert amount(6.74e9, " parameters", billion="B") == "6.74 B parameters"
    assert amount(1.2e16, "FLOP") == "12000 TFLOP"


libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is missing"
)


@libtpu
def test_a_mesh_must_use_all_of_a_slice():
    run = dataclasses.replace(tiny_run("."), mesh=MeshConfig(fsdp=2))
    with pytest.raises(UserError, match=r"v5e:2x2 has 4 devices; mesh .* = 2 must use all"):
        report_of(run, "v5e:2x2")


@pytest.mark.slow
@libtpu
def test_a_report_of_a_ring_on_a_slice_of_a_tpu():
    ring = ParallelConfig(strategy="ring", layout="zigzag")
    model = dataclasses.replace(TRANSFORMER, dtype="bfloat16")
    data = DataConfig(sequence_length=1024, batch_size=2)
    run = dataclasses.replace(
        tiny_run("."), model=model, data=data, mesh=MeshConfig(fsdp=2, seq=2), parallel=ring
    )
    report = report_of(run, "v5e:2x2")
    assert report["fits"] and report["devices"] == 4 and report["tokens_per_step"] == 2048
    found = {(row["kind"], row["axes"]): row for row in report["collectives"]}
    keys = found["collective-permute", "seq"]
    assert (keys["count"], keys["exposed"]) == (5, 0)  # k, v, twice, and their gradients at once
    shard = 512 * 2 * 8  # tokens, heads, width
    assert keys["bytes"] == shard * (4 * 2 + 2 * 4)  # in bfloat16, and gradients in float32
    assert ("all-gather", "fsdp") in found  # parameters
    memory = report["bytes_per_device"]
    assert memory["all"] == sum(memory[x] for x in ("state_and_batch", "temporary", "outputs"))
