"""Named architectures and sizes.

TransNormerLLM shapes (width, layers, heads, SGLU width) up to 3B are those of the authors'
released configurations, Llama's and Mistral's of theirs; what else a number rests on stands
beside it.
"""

import dataclasses
from typing import Any

from longctx.models.config import (
    LightningConfig,
    MlpConfig,
    ModelConfig,
    ResidualConfig,
    SoftmaxConfig,
)
from longctx.nn.position import RopeScaling

BYTE_VOCAB = 259  # 256 bytes and three special tokens (ours)


def tnl(width: int, num_layers: int, mlp_width: int, *, head_dim: int = 128) -> ModelConfig:
    """A TransNormerLLM; heads are `head_dim` wide and fill the width."""
    lightning = LightningConfig(num_heads=width // head_dim, head_dim=head_dim)
    return ModelConfig(
        width=width, num_layers=num_layers, lightning=lightning, mlp=MlpConfig(width=mlp_width)
    )


def transformer(base: ModelConfig) -> ModelConfig:
    """A softmax Transformer of the shape of `base`: pre-norm, RoPE, SwiGLU, weighted RMSNorm.

    It lacks the gate's width^2 weights per layer; the SwiGLU is a third of the width wider for
    it, to the nearest 64 (ours: the papers do not print their baseline's shape).
    """
    heads, head_dim = base.lightning.num_heads, base.lightning.head_dim
    hidden = round((base.mlp.width + base.width / 3) / 64) * 64
    return dataclasses.replace(
        base,
        mixers=("softmax",),
        softmax=SoftmaxConfig(num_heads=heads, num_kv_heads=heads, head_dim=head_dim),
        mlp=MlpConfig(width=hidden, activation="silu"),
        norm="rms",
        scale_embedding=False,
    )


def llama(
    width: int,
    num_layers: int,
    mlp_width: int,
    softmax: SoftmaxConfig,
    *,
    vocab_size: int = 32000,
    norm_eps: float = 1e-5,
) -> ModelConfig:
    """A model of Llama's kind: pre-norm with weighted RMSNorm, RoPE, SwiGLU, a head of its own."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        mixers=("softmax",),
        softmax=softmax,
        mlp=MlpConfig(width=mlp_width, activation="silu"),
        norm="rms",
        norm_eps=norm_eps,
        tied_head=False,
        scale_embedding=False,
    )


def without_gate(base: ModelConfig) -> ModelConfig:
    """The gating ablation: no gate, and an SGLU of three times the width.

    That width gives the paper's 379M parameters at 385M; dropping the gate alone would give 360M.
    """
    return dataclasses.replace(
        base,
        lightning=dataclasses.replace(base.lightning, gate="off"),
        mlp=dataclasses.replace(base.mlp, width=3 * base.width),
    )


def small(base: ModelConfig, **changes: Any) -> ModelConfig:
    """`base` on bytes in float32: for tests, CPUs, and studies at reduced scale (ours)."""
    return dataclasses.replace(base, vocab_size=BYTE_VOCAB, dtype="float32", **changes)


TNL_385M = tnl(1024, 24, 2816)  # released config
TNL_1B = tnl(2048, 16, 5632)  # released config
TNL_3B = tnl(2560, 32, 6912)  # released config
TNL_7B = tnl(4096, 30, 11008)  # layers and heads: author notes; SGLU width fits the 6.8B (ours)
# Our reading: layers, width and heads of 15B from a released config and paper, its SGLU width from
# the 2.7 x width of the others and from the name; 175B wholly recalled or fitted to its name.
TNL_15B = dataclasses.replace(tnl(5120, 42, 13824), vocab_size=100352)
TNL_175B = tnl(12288, 88, 33280)

TNL_TINY = small(tnl(128, 4, 352, head_dim=32), unroll=True)  # the quickstart's (ours)

GPT2_SMALL = ModelConfig(  # GPT-2's shape, as in the baselines of 2306.01160; no biases (ours)
    vocab_size=50304,  # 50257, filled up to a multiple of 128
    width=768,
    num_layers=12,
    mixers=("softmax",),
    softmax=SoftmaxConfig(num_heads=12, num_kv_heads=12, head_dim=64, rope=False),
    mlp=MlpConfig(kind="mlp", width=3072, activation="gelu"),
    norm="layer",
    norm_eps=1e-5,
    learned_positions=1024,
    scale_embedding=False,
)

# The models that 2410.20926 adapts (of Llama-8B it does not say which), and a smaller one.
LLAMA_3_8B = llama(
    4096, 32, 14336, SoftmaxConfig(32, 8, 128, rope_base=500000.0), vocab_size=128256
)
LLAMA_3_2_1B = dataclasses.replace(
    llama(
        2048,
        16,
        8192,
        SoftmaxConfig(
            32, 8, 64, rope_base=500000.0, rope_scaling=RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
        ),
        vocab_size=128256,
    ),
    tied_head=True,
)
MISTRAL_7B = dataclasses.replace(  # version 0.1, the one with a window
    llama(4096, 32, 14336, SoftmaxConfig(32, 8, 128, window=4096)), mixers=("window",)
)
OPEN_LLAMA_3B = llama(3200, 26, 8640, SoftmaxConfig(32, 32, 100), norm_eps=1e-6)

# MiniMax-01's shape (its released configuration), with a dense SwiGLU of the experts' width in
# place of 32 experts (ours).
MINIMAX = ModelConfig(
    vocab_size=200064,
    width=6144,
    num_layers=80,
    mixers=("lightning",) * 7 + ("softmax",),
    lightning=LightningConfig(
        num_heads=64,
        head_dim=128,
        position="exp_decay",
        gate="sigmoid",
        value_activation="silu",
        norm="rms",
    ),
    softmax=SoftmaxConfig(num_heads=64, num_kv_heads=8, head_dim=128, rope_fraction=0.5),
    mlp=MlpConfig(width=9216, activation="silu"),
    norm="rms",
    norm_eps=1e-5,
    residual=ResidualConfig(  # alpha = (2 layers)^(1/4)
        (160**0.25, 1.0), (160**0.25, 1.0), (160**0.25, 1.0), post_norm=True
    ),
    tied_head=False,
    scale_embedding=False,
)

MODELS: dict[str, ModelConfig] = {
    "tnl-tiny": TNL_TINY,
    "tnl-385m": TNL_385M,
    "tnl-1b": TNL_1B,
    "tnl-3b": TNL_3B,
    "tnl-7b": TNL_7B,
    "tnl-15b": TNL_15B,
    "tnl-175b": TNL_175B,
    "transformer-tiny": transformer(TNL_TINY),
    "transformer-385m": transformer(TNL_385M),
    "transformer-1b": transformer(TNL_1B),
    "transformer-3b": transformer(TNL_3B),
    "transformer-7b": transformer(TNL_7B),
    "hybrid-tiny": dataclasses.replace(
        TNL_TINY,
        mixers=("lightning", "softmax"),
        softmax=SoftmaxConfig(num_heads=4, num_kv_heads=2, head_dim=32),
    ),
    "gpt2-small": GPT2_SMALL,
    "gpt2-hash": dataclasses.replace(  # the hash-sparse model of 2306.01160 at 8192 tokens
        GPT2_SMALL, mixers=("hash",), learned_positions=8192
    ),
    "gpt2-tiny": small(
        dataclasses.replace(
            GPT2_SMALL,
            width=128,
            num_layers=4,
            softmax=SoftmaxConfig(num_heads=4, num_kv_heads=4, head_dim=32, rope=False),
            mlp=dataclasses.replace(GPT2_SMALL.mlp, width=512),
        )
    ),
    "llama-3-8b": LLAMA_3_8B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "mistral-7b": MISTRAL_7B,
    "open-llama-3b": OPEN_LLAMA_3B,
    "minimax": MINIMAX,
}
