"""Stacks of layers: what the backward pass is to compute again is kept apart from the forward."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.longctx.models.tiny import CONFIGS, tiny_model

MODEL = dataclasses.replace(CONFIGS["transformer"], num_layers=4, remat="block")


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 0),  # a loop's backward is another loop: XLA cannot take one for the other
        ({"unroll": True}, 4),
        ({"num_layers": 1}, 1),
        ({"mixers": ("softmax", "window", "window", "softmax")}, 2),  # and a loop of two between
    ],
    ids=["a loop", "an unrolled loop", "one layer", "layers beside a loop"],
)
def test_layers_outside_of_loops_are_behind_barriers(changes, layers):
    model = dataclasses.replace(MODEL, **changes)
    graph, params, rest = nnx.split(tiny_model(model), nnx.Param, ...)

    def loss(params, tokens):
        return jnp.sum(nnx.merge(graph, params, rest)(tokens))

    step = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((1, 8), jnp.int32))
    assert step.as_text().count("optimization_barrier") == layers
