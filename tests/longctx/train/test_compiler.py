"""That what XLA is told about training steps works, by ahead-of-time compiles."""

import pytest

from longctx.data.config import DataConfig
from longctx.models import LightningConfig, MlpConfig, ModelConfig
from longctx.parallel import MeshConfig, verify_overlap
from longctx.plan import compile_step
from longctx.train.config import RunConfig
from tests.topologies import gpu_mesh

# Each weight's gradient is larger than what is summed together.
MODEL = ModelConfig(
    vocab_size=256,
    width=1024,
    num_layers=3,
    lightning=LightningConfig(num_heads=8, head_dim=128),
    mlp=MlpConfig(width=2048, chunk=1024),
    remat="block",
)


@pytest.mark.slow
def test_gpus_compute_while_they_sum_each_gradient():
    config = RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=16384, batch_size=1),
        mesh=MeshConfig(seq=2),
    )
    mesh = gpu_mesh({"data": 1, "fsdp": 1, "seq": 2, "tensor": 1})
    moves = verify_overlap(compile_step(config, mesh)).of("all-reduce")
    layers = [move for move in moves if move.times == 2]
    # Of the projections into and out of the attention and of the MLP's.
    assert sorted(move.bytes / 2**20 for move in layers) == [2, 4, 8, 8]
    assert not [move for move in layers if move.exposed]
