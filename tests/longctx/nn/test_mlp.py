"""Channel mixers and activations against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.nn.mlp import ACTIVATIONS, GLU, MLP, activation_function
from tests.harness import assert_close

X = jax.random.normal(jax.random.key(0), (2, 3, 4))
FORMULAS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "elu1": lambda x: np.where(x > 0, 1 + x, np.exp(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(activation_function(name)(x), FORMULAS[name](x), atol=1e-6)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gated_unit(activation):
    module = GLU(4, 6, activation=activation, std=0.5, rngs=nnx.Rngs(0))
    value, gate = jnp.moveaxis(jnp.einsum("btm,mpf->btpf", X, module.expand.kernel[...]), 2, 0)
    hidden = FORMULAS[activation](value) * gate
    assert_close(module(X), hidden @ module.contract.kernel[...], 1e-6)


def test_two_layers():
    module = MLP(4, 6, std=0.5, rngs=nnx.Rngs(0))
    hidden = FORMULAS["gelu"](X @ module.expand.kernel[...])
    assert_close(module(X), hidden @ module.contract.kernel[...], 1e-6)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='tanh' must be one of"):
        activation_function("tanh")
