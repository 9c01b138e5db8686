"""The smallest models that have every part, for the tests of everything that needs a model."""

import dataclasses
import functools

from flax import nnx

from longctx.models import Decoder, LightningConfig, MlpConfig, ModelConfig, SoftmaxConfig, build

TINY = ModelConfig(
    vocab_size=50,
    width=16,
    num_layers=2,
    lightning=LightningConfig(num_heads=2, head_dim=8),
    softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=4),
    mlp=MlpConfig(width=24),
    init_std=0.3,  # large, so that no part of a model is lost in rounding
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


@functools.cache
def tiny_model(config: str | ModelConfig) -> Decoder:
    config = CONFIGS[config] if isinstance(config, str) else config
    return nnx.jit(lambda: build(config, rngs=nnx.Rngs(0)))()
