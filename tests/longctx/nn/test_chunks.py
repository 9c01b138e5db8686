"""The blockwise feed-forward: the values of the whole MLP, in the memory of a chunk."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from longctx.nn import GLU
from longctx.nn.chunks import in_chunks
from longctx.nn.sharding import DEFAULT_AXES
from tests.harness import assert_close

WIDTH, HIDDEN = 32, 1024


def gradients(chunk, dtype="float32"):
    mlp = GLU(WIDTH, HIDDEN, activation="silu", dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mlp)

    def total(state, x):
        mlp = nnx.merge(graph, state)
        return jnp.sum(jnp.sin(in_chunks(mlp, x, mlp.weights(), chunk, DEFAULT_AXES)))

    return jax.jit(jax.value_and_grad(total, (0, 1))), state


@pytest.mark.parametrize("chunk", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_equals_the_whole(chunk):
    x = jax.random.normal(jax.random.key(1), (2, 20, WIDTH))
    (whole, state), (chunks, _) = gradients(0), gradients(chunk)
    assert_close(chunks(state, x), whole(state, x), 1e-5)


def test_gradients_of_weights_are_summed_in_float32():
    x = jax.random.normal(jax.random.key(1), (1, 2048, WIDTH), jnp.bfloat16)
    run, state = gradients(8, "bfloat16")
    (_, (found, _)), (_, (wanted, _)) = run(state, x), gradients(0)[0](state, x.astype("float32"))
    for one, exact in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.float32
        assert jnp.linalg.norm(one - exact) < 0.005 * jnp.linalg.norm(exact)


def equations(jaxpr, inside=False):
    """Every equation, and whether a loop repeats it."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, inside or equation.primitive.name == "scan")


def test_weights_are_rounded_once_and_not_for_every_chunk():
    run, state = gradients(8, "bfloat16")
    traced = jax.make_jaxpr(run)(state, jnp.zeros((1, 64, WIDTH), jnp.bfloat16))
    kernels = [kernel.shape for kernel in jax.tree.leaves(state)]
    rounded = [
        inside
        for equation, inside in equations(traced.jaxpr)
        if equation.primitive.name == "convert_element_type"
        and equation.params["new_dtype"] == jnp.bfloat16
        and equation.outvars[0].aval.shape in kernels
    ]
    assert len(rounded) == 4 and not any(rounded)  # two kernels and their gradients


def test_wide_features_exist_for_one_chunk():
    x = jax.ShapeDtypeStruct((1, 4096, WIDTH), jnp.float32)

    def temporary(chunk):
        run, state = gradients(chunk)
        return run.lower(state, x).compile().memory_analysis().temp_size_in_bytes

    wide = 4096 * 2 * HIDDEN * 4
    assert temporary(0) > wide
    assert temporary(256) < wide / 2
