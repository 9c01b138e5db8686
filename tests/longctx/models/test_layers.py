"""Parameters by layer: the same whatever periods they are stacked in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import MODELS, ModelConfig, build
from longctx.models.layers import by_layer, put_layers

SOFTMAX = dataclasses.replace(MODELS["transformer-tiny"], width=32, num_layers=4)
ALTERNATING = dataclasses.replace(SOFTMAX, mixers=("softmax", "window"))


def parameters(config: ModelConfig, seed: int) -> nnx.State:
    return nnx.state(build(config, rngs=nnx.Rngs(seed)), nnx.Param)


@pytest.mark.parametrize("config", [MODELS["hybrid-tiny"], ALTERNATING])
def test_roundtrip(config):
    given = by_layer(config, parameters(config, 0))
    filled = put_layers(config, parameters(config, 1), given)
    got = by_layer(config, filled)
    assert got.keys() == given.keys()
    jax.tree.map(np.testing.assert_array_equal, got, given)


def test_layers_keep_their_place_in_another_pattern():
    """One period of one block against two periods of two: layer i is layer i in both."""
    given = by_layer(SOFTMAX, parameters(SOFTMAX, 0))
    assert {path[1] for path in given if path[0] == "layers"} == {0, 1, 2, 3}
    filled = put_layers(ALTERNATING, parameters(ALTERNATING, 1), given)
    jax.tree.map(np.testing.assert_array_equal, by_layer(ALTERNATING, filled), given)


def test_what_is_not_given_stays():
    before = parameters(SOFTMAX, 0)
    path = ("layers", 2, "mixer", "output", "kernel")
    new = jnp.ones_like(by_layer(SOFTMAX, before)[path])
    after = by_layer(SOFTMAX, put_layers(SOFTMAX, before, {path: new}))
    for name, value in by_layer(SOFTMAX, before).items():
        np.testing.assert_array_equal(after[name], new if name == path else value)


def test_other_shapes_are_named():
    path = ("layers", 2, "mixer", "output", "kernel")
    with pytest.raises(ValueError, match=r"layers.2.mixer.output.kernel \(3,\), not \(128, 32\)"):
        put_layers(SOFTMAX, parameters(SOFTMAX, 0), {path: jnp.zeros(3)})
