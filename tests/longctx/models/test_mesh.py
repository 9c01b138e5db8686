"""Models on a mesh of eight CPU devices: the numbers of one device, and no activation gathered."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.models import ParallelConfig, SoftmaxConfig, build
from longctx.nn import chunked_cross_entropy, token_positions
from longctx.parallel import Layout, make_mesh
from longctx.parallel.layout import as_layout
from tests.harness import assert_close
from tests.longctx.models.tiny import CONFIGS, tiny_model

BATCH, LENGTH = 8, 24


def batch():
    """Packed rows of two documents, the second one starting elsewhere in each row."""
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, 50)
    second = jnp.arange(BATCH)[:, None] + 6
    doc_start = jnp.where(jnp.arange(LENGTH)[None] >= second, second, 0).astype(jnp.int32)
    targets = jnp.roll(tokens, -1, axis=1)
    return tokens, targets, doc_start, token_positions(LENGTH, doc_start)


def run(config, parallel=None, layout=None, axis_type=AxisType.Auto, **sizes):
    """Loss, gradients and compiled program of one pass on the mesh of the given sizes."""
    graph, params, rest = nnx.split(tiny_model(config), nnx.Param, ...)
    arrays = batch()
    if parallel is not None:
        abstract = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), parallel=parallel))
        graph = nnx.graphdef(abstract)
    if layout is not None:
        arrays = layout.apply(arrays)

    def loss(params, rest, tokens, targets, doc_start, positions):
        model = nnx.merge(graph, params, rest)
        hidden = model(tokens, doc_start=doc_start, positions=positions)
        return jnp.mean(chunked_cross_entropy(hidden, model.head(), targets, chunk=7))

    step = jax.jit(jax.value_and_grad(loss))
    if not sizes:
        return step(params, rest, *arrays), ""
    mesh = make_mesh(axis_type=axis_type, **sizes)
    with jax.set_mesh(mesh):
        params, rest = (
            jax.device_put(state, nnx.get_named_sharding(state, mesh)) for state in (params, rest)
        )
        spec = NamedSharding(mesh, P(("data", "fsdp"), "seq"))
        arrays = [jax.device_put(x, spec) for x in arrays]
        compiled = step.lower(params, rest, *arrays).compile()
        return compiled(params, rest, *arrays), compiled.as_text()


def gathered_shapes(program):
    return [
        tuple(map(int, m.split(","))) for m in re.findall(r"\[([\d,]+)\]\S* all-gather", program)
    ]


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("tnl", AxisType.Auto),
        ("transformer", AxisType.Auto),
        ("transformer", AxisType.Explicit),
        ("gpt2", AxisType.Explicit),
    ],
)
def test_data_and_fsdp_equal_one_device(name, axis_type):
    config = CONFIGS[name]
    want, _ = run(config)
    got, program = run(config, axis_type=axis_type, data=2, fsdp=4)
    assert_close(got, want, 1e-5)
    gathered = gathered_shapes(program)
    assert gathered, "fsdp gathers weights"
    assert not [s for s in gathered if BATCH in s or BATCH * LENGTH in s], gathered


@pytest.mark.parametrize(
    ("fsdp_over_seq", "gather"), [(False, "layer"), (True, "layer"), (True, "step")]
)
def test_all_axes_and_the_zigzag_layout_equal_one_device(fsdp_over_seq, gather):
    config = dataclasses.replace(CONFIGS["hybrid"], num_layers=2)
    want, _ = run(config)
    parallel = ParallelConfig("ring", layout="zigzag", fsdp_over_seq=fsdp_over_seq, gather=gather)
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, chunk=5))
    got, _ = run(config, parallel, Layout("zigzag", 2), fsdp=2, seq=2, tensor=2)
    assert_close(got, want, 1e-5)


def test_explicit_axes_equal_one_device():
    config = dataclasses.replace(CONFIGS["hybrid"], num_layers=2, remat="block")
    want, _ = run(config)
    config = dataclasses.replace(config, mlp=dataclasses.replace(config.mlp, chunk=5))
    sizes = {"fsdp": 2, "seq": 2, "tensor": 2}
    got, _ = run(config, axis_type=AxisType.Explicit, **sizes)
    assert_close(got, want, 1e-5)


ONE_KV_HEAD = dataclasses.replace(
    CONFIGS["transformer"],
    vocab_size=52,  # divides by four
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=1, head_dim=8),
)


@pytest.mark.parametrize(
    ("config", "parallel", "sizes"),
    [
        pytest.param(CONFIGS["tnl"], None, {"data": 2, "fsdp": 2, "tensor": 2}, id="tnl"),
        pytest.param(ONE_KV_HEAD, None, {"data": 2, "tensor": 4}, id="one key head for four"),
        pytest.param(
            CONFIGS["tnl"],
            ParallelConfig(),
            {"data": 2, "seq": 2, "tensor": 2},
            id="tnl, sequence",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            CONFIGS["hybrid"],
            ParallelConfig(strategy="usp", layout="zigzag", ranks=2),
            {"seq": 4, "tensor": 2},
            id="hybrid, usp",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            CONFIGS["transformer"],
            ParallelConfig(strategy="ulysses"),
            {"data": 2, "fsdp": 2, "seq": 2},
            id="transformer, ulysses",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_combined_axes_equal_one_device(config, parallel, sizes):
    """Loss and gradients: heads, MLP columns and vocabulary over `tensor`, norms over all heads."""
    want, _ = run(config)
    layout = as_layout(parallel.token_layout, sizes.get("seq", 1)) if parallel else None
    got, _ = run(config, parallel, layout, **sizes)
    assert_close(got, want, 1e-5)


def test_zigzag_layout_needs_positions():
    config = CONFIGS["tnl"]
    abstract = nnx.eval_shape(
        lambda: build(config, rngs=nnx.Rngs(0), parallel=ParallelConfig(layout="zigzag"))
    )
    with jax.set_mesh(make_mesh(seq=2)), pytest.raises(ValueError, match="positions"):
        jax.eval_shape(lambda: abstract(jnp.zeros((1, 8), jnp.int32)))
