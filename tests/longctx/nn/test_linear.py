"""Projections and embeddings: initial values, and gradients that do not lose small terms."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.nn import Embedding, Linear
from longctx.nn.sharding import DEFAULT_AXES


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
