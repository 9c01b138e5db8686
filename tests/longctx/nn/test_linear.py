"""Projections and embeddings: initial values, and gradients that do not lose small terms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.nn import Embedding, Linear
from longctx.nn.sharding import DEFAULT_AXES
from longctx.parallel import make_mesh
from tests.harness import assert_close


def test_weights_start_normal_with_the_given_deviation():
    table = Embedding(200, 100, axes=DEFAULT_AXES, rngs=nnx.Rngs(0)).table[...]
    assert abs(np.std(table) - 0.02) < 5e-4
    kernel = Linear(
        100, (2, 100), spec=(None, None, None), axes=DEFAULT_AXES, std=0.5, rngs=nnx.Rngs(0)
    ).kernel[...]
    assert kernel.shape == (100, 2, 100)
    assert abs(np.std(kernel) - 0.5) < 1e-2


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    table = Embedding(3, 4, axes=DEFAULT_AXES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, 5000), jnp.int32)
    assert table(tokens).dtype == jnp.bfloat16
    grads = nnx.grad(lambda table: jnp.sum(table(tokens).astype(jnp.float32)))(table)
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0][1], 10000.0)


@pytest.mark.parametrize(("tokens", "moved"), [(32, "all-gather"), (64, "all-reduce")])
def test_devices_along_the_sequence_swap_few_tokens_or_sum_tables(tokens, moved):
    table = Embedding(64, 8, axes=DEFAULT_AXES, rngs=nnx.Rngs(0))
    index = jnp.arange(tokens)[None] ** 2 % 64

    def loss(table, index):
        return jnp.sum(jnp.sin(jnp.arange(tokens)[None, :, None] * table(index)))

    gradient = jax.jit(jax.grad(loss))
    wanted = gradient(table, index)
    mesh = make_mesh(seq=4)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, P()))
        index = jax.device_put(index, NamedSharding(mesh, P(None, "seq")))
        compiled = gradient.lower(table, index).compile()
        assert_close(compiled(table, index), wanted, 1e-6)
    kinds = re.findall(r"= f32\S+ (all-\w+)\(", compiled.as_text())
    assert kinds == [moved]
