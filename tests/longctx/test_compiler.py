"""That what XLA is told works, by ahead-of-time compiles."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longctx import compiler, generate
from longctx.data.config import DataConfig
from longctx.models import (
    LightningConfig,
    MlpConfig,
    ModelConfig,
    ParallelConfig,
    build,
    transformer,
)
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


def moves_in_layers(**parallel):
    """Of a training step on two GPUs: what its loop over layers moves."""
    config = RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=16384, batch_size=1),
        mesh=MeshConfig(seq=2),
        parallel=ParallelConfig(**parallel),
    )
    mesh = gpu_mesh({"data": 1, "fsdp": 1, "seq": 2, "tensor": 1})
    return [move for move in verify_overlap(compile_step(config, mesh)).moves if move.times == 2]


@pytest.mark.slow
def test_gpus_compute_while_they_sum_each_gradient():
    layers = [move for move in moves_in_layers() if move.kind == "all-reduce"]
    # Of the projections into and out of the attention and of the MLP's.
    assert sorted(move.bytes / 2**20 for move in layers) == [2, 4, 8, 8]
    assert not [move for move in layers if move.exposed]


@pytest.mark.slow
def test_gpus_compute_while_gradients_go_to_their_owners():
    """Of weights gathered once a step: loops hold permutes only, nothing that takes cores."""
    moves = moves_in_layers(states="ring", fsdp_over_seq=True, gather="step")
    assert {move.kind for move in moves} == {"collective-permute"}
    # Half of each gradient of 2, 4, 8 and 8 MiB, and in both directions the state of 8 heads.
    assert sum(move.bytes for move in moves) == 11 * 2**20 + 2 * (8 * 128 * 128 * 4)
    assert not max(moves, key=lambda move: move.bytes).exposed


@pytest.mark.parametrize(("platform", "copies"), [("gpu", False), ("cpu", True)])
def test_gpus_read_weights_where_they_lie(platform, copies):
    """Decoding copies no layer's weights before it multiplies by them; without options it does."""
    config = dataclasses.replace(MODEL, param_dtype="bfloat16")
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    sharding = NamedSharding(gpu_mesh({"x": 1}), PartitionSpec())

    def on_gpu(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state, prompts = jax.tree.map(on_gpu, (state, jax.ShapeDtypeStruct((4, 8), jnp.int32)))
    run = generate._jitted(platform)
    arguments = graph, state, prompts, None, None, 4, generate.Sampling(), None, None
    compiled = run.lower(*arguments).compile()
    copied = re.findall(r"ROOT %dynamic_slice\S* = bf16\[1,\d+,\S+", compiled.as_text())
    assert bool(copied) == copies, copied


def test_gpus_write_tokens_and_read_the_cache_where_they_lie():
    """Decoding needs no second copy of a layer's keys and values, however long they are."""
    config = dataclasses.replace(transformer(MODEL), param_dtype="bfloat16")
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)).init_cache(8, 8192))
    sharding = NamedSharding(gpu_mesh({"x": 1}), PartitionSpec())
    token = jax.ShapeDtypeStruct((8,), jnp.int32)
    state, token, cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, token, cache)
    )

    def decode(state, token, cache):
        return nnx.merge(graph, state).decode(token, cache)

    options = compiler.decoding_options("gpu")
    run = jax.jit(decode, donate_argnums=2, compiler_options=options)
    memory = run.lower(state, token, cache).compile().memory_analysis()
    keys = 8 * 8192 * config.softmax.num_kv_heads * config.softmax.head_dim * 2
    assert memory.temp_size_in_bytes < keys / 2
