"""MiniMax-01's hybrids of lightning and softmax layers: config.json and tensors.

Of the layout of transformers, without the mixture of experts: one expert per layer, which is a
SwiGLU. Decays are the authors'; transformers writes their layer factor 1 - l / (L - 1 + 1e-5),
which differs by 1e-5 at most.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longctx.errors import UserError
from longctx.hf.llama import attention, norms
from longctx.hf.recipe import Path, Recipe, kernel, kernels, same
from longctx.hf.settings import read_softmax, require, write_softmax
from longctx.models import LightningConfig, MlpConfig, ModelConfig, ResidualConfig

# Their names for our fields of `ResidualConfig`.
RESIDUALS = {"lightning": "linear_attn", "softmax": "full_attn", "mlp": "mlp"}


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes."""
    require(
        {
            "hidden_act": config.get("hidden_act", "silu"),
            "num_local_experts": config.get("num_local_experts", 8),
        },
        {"hidden_act": "silu", "num_local_experts": 1},
    )
    softmax = read_softmax(config, default_base=1e6)
    heads, layers = softmax.num_heads, config["num_hidden_layers"]
    if heads & (heads - 1):
        raise UserError(f"num_attention_heads={heads} must be a power of two: decays differ else")
    exact = "window" if config.get("sliding_window") else "softmax"
    types = config.get("layer_types") or ["full_attention", "linear_attention"] * layers
    if len(types) < layers:
        raise UserError(
            f"layer_types has {len(types)} entries: num_hidden_layers={layers} needs one per layer"
        )
    kinds = {"full_attention": exact, "linear_attention": "lightning"}
    unknown = set(types[:layers]) - kinds.keys()
    if unknown:
        raise UserError(f"layer_types={sorted(unknown)} must be among {sorted(kinds)}")
    weights = {}
    for ours, theirs in RESIDUALS.items():
        alpha, beta = (config.get(f"{theirs}_{name}_factor", 1) for name in ("alpha", "beta"))
        weights[ours] = (float(alpha), float(beta))
    return ModelConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=layers,
        mixers=_pattern([kinds[t] for t in types[:layers]]),
        lightning=_lightning(heads, softmax.head_dim),
        softmax=softmax,
        mlp=MlpConfig(width=config["intermediate_size"], activation="silu"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-5),
        residual=ResidualConfig(**weights, post_norm=True),
        tied_head=config.get("tie_word_embeddings", False),
        scale_embedding=False,
    )


def to_config(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model."""
    linear, soft, kinds = model.lightning, model.softmax, model.layer_kinds()
    require(
        {
            "softmax and window layers": {"softmax", "window"} <= set(kinds),
            "other mixers": set(kinds) - {"lightning", "softmax", "window"},
            "lightning": linear,
            "power of two heads": soft.num_heads & (soft.num_heads - 1) == 0,
            "mlp": (model.mlp.kind, model.mlp.activation),
            "norm": model.norm,
            "post_norm": model.residual.post_norm,
            "scale_embedding": model.scale_embedding,
            "learned_positions": model.learned_positions,
        },
        {
            "softmax and window layers": False,
            "other mixers": set(),
            "lightning": _lightning(soft.num_heads, soft.head_dim),
            "power of two heads": True,
            "mlp": ("glu", "silu"),
            "norm": "rms",
            "post_norm": True,
            "scale_embedding": False,
            "learned_positions": 0,
        },
    )
    weights = {}
    for ours, theirs in RESIDUALS.items():
        alpha, beta = getattr(model.residual, ours)
        weights |= {f"{theirs}_alpha_factor": alpha, f"{theirs}_beta_factor": beta}
    types = {"lightning": "linear_attention"}
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp.width,
        "num_hidden_layers": model.num_layers,
        "layer_types": [types.get(kind, "full_attention") for kind in kinds],
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        **weights,
        **write_softmax(soft, window="window" in kinds),
    }


def layer(model: ModelConfig, kind: str, prefix: str) -> dict[Path, Recipe]:
    """The parameters of one layer, whose tensors begin with `prefix`."""
    expert = f"{prefix}.block_sparse_moe.experts.0"
    mixer = f"{prefix}.self_attn"
    if kind == "lightning":
        mixing = {
            ("mixer", "project", "kernel"): _project(mixer, model.lightning.num_heads),
            ("mixer", "output", "kernel"): kernel(f"{mixer}.out_proj.weight"),
            ("mixer", "norm", "weight"): same(f"{mixer}.norm.weight"),
        }
    else:
        mixing = attention(mixer)
    return {
        **mixing,
        **norms(prefix),
        ("mlp", "expand", "kernel"): kernels(f"{expert}.w1.weight", f"{expert}.w3.weight"),
        ("mlp", "contract", "kernel"): _contract(
            f"{expert}.w2.weight", f"{prefix}.block_sparse_moe.gate.weight"
        ),
    }


def _lightning(heads: int, head_dim: int) -> LightningConfig:
    return LightningConfig(
        num_heads=heads,
        head_dim=head_dim,
        position="exp_decay",
        gate="sigmoid",
        value_activation="silu",
        norm="rms",
    )


def _pattern(kinds: list[str]) -> tuple[str, ...]:
    """The shortest beginning of `kinds` that, repeated, gives all of them."""
    sizes = range(1, len(kinds) + 1)
    size = next(n for n in sizes if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return tuple(kinds[:size])


def _project(prefix: str, heads: int) -> Recipe:
    """q, k, v interleaved by head [H * 3 * D, M], and the gate [H * D, M], as [M, 4, H * D]."""

    def join(tensors):
        qkv, gate = tensors
        width = qkv.shape[1]
        qkv = qkv.T.reshape(width, heads, 3, -1).swapaxes(1, 2).reshape(width, 3, -1)
        return np.concatenate([qkv, gate.T[:, None]], axis=1)

    def split(x):
        qkv = x[:, :3].reshape(x.shape[0], 3, heads, -1).swapaxes(1, 2)
        return [qkv.reshape(x.shape[0], -1).T, x[:, 3].T]

    return Recipe((f"{prefix}.qkv_proj.weight", f"{prefix}.output_gate.weight"), join, split)


def _contract(name: str, router: str) -> Recipe:
    """The output kernel; the router's weight has no effect beside one expert and is zero."""
    return Recipe(
        (name, router), lambda xs: xs[0].T, lambda x: [x.T, np.zeros((1, x.shape[1]), x.dtype)]
    )
