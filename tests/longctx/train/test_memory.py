"""What a training step needs of each device's memory, by the TPU compiler."""

import dataclasses

import pytest

from experiments.bench.ring.topology import devices_of
from longctx.data.config import DataConfig
from longctx.models import MlpConfig, ModelConfig, SoftmaxConfig
from longctx.models.config import ParallelConfig
from longctx.parallel.mesh import MeshConfig, make_mesh
from longctx.plan import bytes_per_device, compile_step
from longctx.train.config import RunConfig

MODEL = ModelConfig(
    vocab_size=256,
    width=256,
    num_layers=4,
    mixers=("softmax",),
    softmax=SoftmaxConfig(num_heads=2, num_kv_heads=2, head_dim=128),
    mlp=MlpConfig(width=2048, chunk=512),
    remat="block",
)


def temporary(devices: int, model: ModelConfig = MODEL) -> int:
    """Bytes on each of `devices` with 8192 tokens each."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    config = RunConfig(
        model=model,
        data=DataConfig(sequence_length=8192 * devices, batch_size=1),
        mesh=MeshConfig(seq=devices),
        parallel=ParallelConfig(strategy="ring", layout="zigzag"),
    )
    mesh = make_mesh(config.mesh, devices=devices_of("v5e", devices))
    return bytes_per_device(compile_step(config, mesh))["temporary"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_total_length():
    assert temporary(16) <= 1.1 * temporary(4)


@pytest.mark.slow
def test_layers_outside_of_loops_are_computed_again_too():
    assert temporary(4, dataclasses.replace(MODEL, unroll=True)) <= temporary(4)
