"""The smallest models that have every part, for the tests of everything that needs a model."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.models import Decoder, LightningConfig, MlpConfig, ModelConfig, SoftmaxConfig, build

TINY = ModelConfig(
    vocab_size=50,
    width=16,
    num_layers=2,
    lightning=LightningConfig(num_heads=2, head_dim=8),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=4),
    mlp=MlpConfig(width=24),
    dtype="float32",
)

CONFIGS = {
    "tnl": TINY,
    "transformer": dataclasses.replace(TINY, mixers=("softmax",), norm="rms"),
    "hybrid": dataclasses.replace(  # two repeats of a period of two layers
        TINY,
        num_layers=4,
        mixers=("lightning", "softmax"),
        lightning=dataclasses.replace(TINY.lightning, position="lrpe_d"),
    ),
    "gpt2": dataclasses.replace(
        TINY,
        mixers=("softmax",),
        softmax=dataclasses.replace(TINY.softmax, rope=False),
        mlp=MlpConfig(kind="mlp", width=24, activation="gelu"),
        norm="layer",
        learned_positions=32,
        tied_head=False,
    ),
}


def abstract_model(config: str | ModelConfig) -> Decoder:
    """The model without values."""
    config = CONFIGS[config] if isinstance(config, str) else config
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


@functools.cache
def tiny_model(config: str | ModelConfig) -> Decoder:
    """The model with every parameter drawn from normal(0, 0.3), by its path: quick, and large
    enough that no part of it is lost in rounding."""
    graph, params, _ = nnx.split(abstract_model(config), nnx.Param, ...)

    def draw(path, x):
        random = np.random.default_rng(zlib.crc32(str(path).encode()))
        return jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype)

    real = CONFIGS[config] if isinstance(config, str) else config
    constants = jax.jit(lambda: nnx.split(build(real, rngs=nnx.Rngs(0)), nnx.Param, ...)[2])()
    return nnx.merge(graph, jax.tree.map_with_path(draw, params), constants)
