"""TransNormerLLM: config.json and tensors, as in the authors' release."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from longctx.errors import UserError
from longctx.hf.recipe import Path, Recipe, fused, kernel, kernels
from longctx.hf.settings import require
from longctx.models import LightningConfig, MlpConfig, ModelConfig, ResidualConfig


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes."""
    heads, width = config["decoder_attention_heads"], config["decoder_embed_dim"]
    lrpe = list(config.get("linear_use_lrpe_list", []))
    layers = config["decoder_layers"]
    positions = {
        tuple([1] + [0] * (layers - 1)): "mix",
        (1,) * layers: "lrpe_d",
        (0,) * layers: "exp_decay",
        (): "exp_decay",
    }
    if tuple(lrpe) not in positions:
        raise UserError(f"linear_use_lrpe_list={lrpe} must be all, none, or the first layer only")
    require(
        {
            "norm_type": config.get("norm_type", "simplermsnorm"),
            "linear_act_fun": config.get("linear_act_fun", "silu"),
            "bias": config.get("bias", False),
        },
        {"norm_type": "simplermsnorm", "linear_act_fun": "silu", "bias": False},
    )
    return ModelConfig(
        vocab_size=config["vocab_size"],
        width=width,
        num_layers=layers,
        lightning=LightningConfig(
            num_heads=heads,
            head_dim=config.get("hidden_dim", width) // heads,
            position=positions[tuple(lrpe)],
        ),
        mlp=MlpConfig(width=config["glu_dim"]),
        tied_head=config.get("tie_word_embeddings", True),
        scale_embedding=not config.get("no_scale_embedding", False),
    )


def to_config(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model."""
    linear = model.lightning
    default = dataclasses.replace(
        LightningConfig(), num_heads=linear.num_heads, head_dim=linear.head_dim
    )
    require(
        {
            "other mixers": set(model.mixers) - {"lightning"},
            "mlp": (model.mlp.kind, model.mlp.activation),
            "norm": model.norm,
            "residual": model.residual,
            "learned_positions": model.learned_positions,
            "lightning": dataclasses.replace(linear, position="mix"),
        },
        {
            "other mixers": set(),
            "mlp": ("glu", "none"),
            "norm": "srms",
            "residual": ResidualConfig(),
            "learned_positions": 0,
            "lightning": default,
        },
    )
    return {
        "architectures": ["TransnormerForCausalLM"],
        "model_type": "transnormer",
        "vocab_size": model.vocab_size,
        "decoder_embed_dim": model.width,
        "decoder_layers": model.num_layers,
        "decoder_attention_heads": linear.num_heads,
        "hidden_dim": linear.num_heads * linear.head_dim,
        "glu_dim": model.mlp.width,
        "linear_act_fun": "silu",
        "linear_use_lrpe_list": [int(k == "lightning+lrpe") for k in model.layer_kinds()],
        "norm_type": "simplermsnorm",
        "no_scale_embedding": not model.scale_embedding,
        "bias": False,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": model.tied_head,
    }


def layer(model: ModelConfig, kind: str, prefix: str) -> dict[Path, Recipe]:
    """The parameters of one layer, whose tensors begin with `prefix`."""
    del model
    mixer, mlp = f"{prefix}.token_mixer", f"{prefix}.channel_mixer"
    rotated = kind == "lightning+lrpe"
    return {
        ("mixer", "project", "kernel"): fused(f"{mixer}.qkvu_proj.weight", 4),
        ("mixer", "output", "kernel"): kernel(f"{mixer}.out_proj.weight"),
        **({("mixer", "lrpe", "theta"): _angles(f"{mixer}.lrpe.theta")} if rotated else {}),
        ("mlp", "expand", "kernel"): kernels(f"{mlp}.l1.weight", f"{mlp}.l2.weight"),
        ("mlp", "contract", "kernel"): kernel(f"{mlp}.l3.weight"),
    }


def _angles(name: str) -> Recipe:
    """Their theta [H, 1, D] as ours [H, D]."""
    return Recipe((name,), lambda xs: xs[0][:, 0], lambda x: [x[:, None]])
