"""Norms against their formulas in float64, and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.nn.norm import make_norm

X = np.random.default_rng(0).standard_normal((2, 3, 5)) + 0.7
WEIGHT, BIAS = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5)


def expected(kind, eps):
    centred = X - X.mean(-1, keepdims=True) if kind == "layer" else X
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed if kind == "srms" else WEIGHT * normed + (BIAS if kind == "layer" else 0)


@pytest.mark.parametrize("kind", ["srms", "rms", "layer"])
def test_norms_are_their_formulas(kind):
    module = make_norm(kind, 5, 0.1, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state(module))) == ["srms", "rms", "layer"].index(kind)
    if kind != "srms":
        module.weight[...] = jnp.asarray(WEIGHT, jnp.float32)
    if kind == "layer":
        module.bias[...] = jnp.asarray(BIAS, jnp.float32)
    np.testing.assert_allclose(module(jnp.asarray(X, jnp.float32)), expected(kind, 0.1), rtol=1e-5)


def test_statistics_are_float32_whatever_comes_in():
    x = jnp.asarray(X * 300, jnp.float16)  # whose squares are infinite in float16
    normed = make_norm("srms", 5, rngs=nnx.Rngs(0))(x)
    assert normed.dtype == jnp.float16
    np.testing.assert_allclose(normed, expected("srms", 0.0), rtol=2e-3, atol=1e-3)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm='group' must be one of"):
        make_norm("group", 5, rngs=nnx.Rngs(0))
