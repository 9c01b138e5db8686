"""Llama, and Mistral with its window: config.json and tensors."""

from collections.abc import Mapping
from typing import Any

from longctx.hf.recipe import Path, Recipe, kernel, kernels, same
from longctx.hf.settings import read_softmax, require, write_softmax
from longctx.models import LightningConfig, MlpConfig, ModelConfig, ResidualConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def from_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes."""
    require(
        {
            "hidden_act": config.get("hidden_act", "silu"),
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
        },
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    )
    softmax = read_softmax(config)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        mixers=("window",) if config.get("sliding_window") else ("softmax",),
        softmax=softmax,
        # Of no layer yet: an adapted model's lightning layers can take over the output weights.
        lightning=LightningConfig(num_heads=softmax.num_heads, head_dim=softmax.head_dim),
        mlp=MlpConfig(width=config["intermediate_size"], activation="silu"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_head=config.get("tie_word_embeddings", False),
        scale_embedding=False,
    )


def to_config(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model."""
    kinds = set(model.layer_kinds())
    require(
        {
            "different mixers": len(kinds) > 1 or not kinds <= {"softmax", "window"},
            "mlp": (model.mlp.kind, model.mlp.activation),
            "norm": model.norm,
            "residual": model.residual,
            "scale_embedding": model.scale_embedding,
            "learned_positions": model.learned_positions,
        },
        {
            "different mixers": False,
            "mlp": ("glu", "silu"),
            "norm": "rms",
            "residual": ResidualConfig(),
            "scale_embedding": False,
            "learned_positions": 0,
        },
    )
    windowed = kinds == {"window"}
    kind = "mistral" if windowed else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp.width,
        "num_hidden_layers": model.num_layers,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_head,
        **write_softmax(model.softmax, window=windowed),
    }


def layer(model: ModelConfig, kind: str, prefix: str) -> dict[Path, Recipe]:
    """The parameters of one layer, whose tensors begin with `prefix`."""
    del model, kind  # all layers are alike
    mlp = f"{prefix}.mlp"
    return {
        **attention(f"{prefix}.self_attn"),
        **norms(prefix),
        ("mlp", "expand", "kernel"): kernels(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        ("mlp", "contract", "kernel"): kernel(f"{mlp}.down_proj.weight"),
    }


def attention(prefix: str) -> dict[Path, Recipe]:
    """The projections of softmax attention."""
    return {
        ("mixer", "query", "kernel"): kernels(f"{prefix}.q_proj.weight"),
        ("mixer", "key_value", "kernel"): kernels(
            f"{prefix}.k_proj.weight", f"{prefix}.v_proj.weight"
        ),
        ("mixer", "output", "kernel"): kernel(f"{prefix}.o_proj.weight"),
    }


def norms(prefix: str) -> dict[Path, Recipe]:
    """The two norms of a layer."""
    return {
        ("mixer_norm", "weight"): same(f"{prefix}.input_layernorm.weight"),
        ("mlp_norm", "weight"): same(f"{prefix}.post_attention_layernorm.weight"),
    }
