"""The blockwise feed-forward: the values of the whole MLP, in the memory of a chunk."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longctx.nn import GLU
from longctx.nn.sharding import DEFAULT_AXES
from longctx.nn.stack import in_chunks
from tests.harness import assert_close

WIDTH, HIDDEN = 32, 1024


def gradients(chunk):
    graph, state = nnx.split(GLU(WIDTH, HIDDEN, activation="silu", rngs=nnx.Rngs(0)))

    def total(state, x):
        return jnp.sum(jnp.sin(in_chunks(nnx.merge(graph, state), x, chunk, DEFAULT_AXES)))

    return jax.jit(jax.value_and_grad(total, (0, 1))), state


@pytest.mark.parametrize("chunk", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_equals_the_whole(chunk):
    x = jax.random.normal(jax.random.key(1), (2, 20, WIDTH))
    (whole, state), (chunks, _) = gradients(0), gradients(chunk)
    assert_close(chunks(state, x), whole(state, x), 1e-5)


def test_wide_features_exist_for_one_chunk():
    x = jax.ShapeDtypeStruct((1, 4096, WIDTH), jnp.float32)

    def temporary(chunk):
        run, state = gradients(chunk)
        return run.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    wide = 4096 * 2 * HIDDEN * 4
    assert temporary(0) > wide
    assert temporary(256) < wide / 2
