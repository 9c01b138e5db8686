"""Hugging Face config.json to `ModelConfig`, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from longctx.errors import UserError
from longctx.models import LightningConfig, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.nn.position import NO_SCALING, RopeScaling

LLAMA_LIKE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
TRANSNORMER = "transnormer"


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes: Llama, Mistral (with its window), TransNormerLLM.

    Raises:
      UserError: another architecture, or a setting that ours lacks; nothing is dropped silently.
    """
    kind = config.get("model_type")
    if kind in LLAMA_LIKE:
        return _from_llama(config)
    if kind == TRANSNORMER:
        return _from_transnormer(config)
    known = ", ".join([*LLAMA_LIKE, TRANSNORMER])
    raise UserError(f"model_type={kind!r} cannot be imported; {known} can")


def to_hf(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model; `max_length` is its longest sequence.

    Raises:
      UserError: no known Hugging Face architecture computes this model.
    """
    if set(model.layer_kinds()) <= {"lightning", "lightning+lrpe"}:
        return _to_transnormer(model, max_length)
    return _to_llama(model, max_length)


def _require(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = [f"{k}={found[k]!r} (must be {v!r})" for k, v in wanted.items() if found[k] != v]
    if wrong:
        raise UserError(f"this model cannot be converted: {', '.join(wrong)}")


def _from_llama(config: Mapping[str, Any]) -> ModelConfig:
    _require(
        {
            "hidden_act": config.get("hidden_act", "silu"),
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
        },
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    )
    heads, width = config["num_attention_heads"], config["hidden_size"]
    window = config.get("sliding_window")
    base, scaling = _rope(config)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        width=width,
        num_layers=config["num_hidden_layers"],
        mixers=("window",) if window else ("softmax",),
        softmax=SoftmaxConfig(
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            rope_base=base,
            rope_scaling=scaling,
            window=window or SoftmaxConfig.window,
        ),
        mlp=MlpConfig(width=config["intermediate_size"], activation="silu"),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied_head=config.get("tie_word_embeddings", False),
        scale_embedding=False,
    )


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """Base and scaling, from the newer `rope_parameters` or the older pair of fields."""
    parameters = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    base = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return base, NO_SCALING
    if kind == "linear":
        return base, RopeScaling("linear", parameters["factor"])
    if kind == "llama3":
        return base, RopeScaling(
            "llama3",
            parameters["factor"],
            parameters["original_max_position_embeddings"],
            parameters["low_freq_factor"],
            parameters["high_freq_factor"],
        )
    raise UserError(f"rope_type={kind!r} cannot be imported; default, linear and llama3 can")


def _to_llama(model: ModelConfig, max_length: int) -> dict[str, Any]:
    soft, kinds = model.softmax, set(model.layer_kinds())
    _require(
        {
            "different mixers": len(kinds) > 1 or not kinds <= {"softmax", "window"},
            "mlp": (model.mlp.kind, model.mlp.activation),
            "norm": model.norm,
            "scale_embedding": model.scale_embedding,
            "learned_positions": model.learned_positions,
            "rope": (soft.rope, soft.rope_fraction),
            "qk_norm": soft.qk_norm,
            "rope_scaling is ntk": soft.rope_scaling.kind == "ntk",
        },
        {
            "different mixers": False,
            "mlp": ("glu", "silu"),
            "norm": "rms",
            "scale_embedding": False,
            "learned_positions": 0,
            "rope": (True, 1.0),
            "qk_norm": False,
            "rope_scaling is ntk": False,
        },
    )
    windowed = kinds == {"window"}
    kind = "mistral" if windowed else "llama"
    rope: dict[str, Any] = {"rope_theta": soft.rope_base, "rope_type": "default"}
    scaling = soft.rope_scaling
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
        }
    return {
        "architectures": [LLAMA_LIKE[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": soft.num_heads,
        "num_key_value_heads": soft.num_kv_heads,
        "head_dim": soft.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tied_head,
        **({"sliding_window": soft.window} if windowed else {}),
    }


def _from_transnormer(config: Mapping[str, Any]) -> ModelConfig:
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
    _require(
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


def _to_transnormer(model: ModelConfig, max_length: int) -> dict[str, Any]:
    linear = model.lightning
    default = dataclasses.replace(
        LightningConfig(), num_heads=linear.num_heads, head_dim=linear.head_dim
    )
    _require(
        {
            "mlp": (model.mlp.kind, model.mlp.activation),
            "norm": model.norm,
            "learned_positions": model.learned_positions,
            "lightning": dataclasses.replace(linear, position="mix"),
        },
        {"mlp": ("glu", "none"), "norm": "srms", "learned_positions": 0, "lightning": default},
    )
    return {
        "architectures": ["TransnormerForCausalLM"],
        "model_type": TRANSNORMER,
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
