"""The architectures that can be imported and exported, and how to tell them apart."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from longctx.errors import UserError
from longctx.hf import llama, minimax, transnormer
from longctx.hf.recipe import Path, Source, same
from longctx.models import ModelConfig
from longctx.models.config import periods

# Each by its `model_type`: a module with from_config, to_config and layer.
ARCHITECTURES: dict[str, ModuleType] = {
    **dict.fromkeys(llama.ARCHITECTURES, llama),
    "transnormer": transnormer,
    "minimax": minimax,
}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
      UserError: another architecture, a setting that is missing or has a wrong type, or one that
        ours lacks; nothing is dropped silently.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"model_type={kind!r} cannot be imported; {known} can")
    try:
        return ARCHITECTURES[kind].from_config(config)
    except KeyError as error:
        raise UserError(
            f"model_type={kind!r} needs the setting {error}, which is missing"
        ) from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"a setting of model_type={kind!r} has a wrong type: {error}") from error


def to_hf(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model; `max_length` is its longest sequence.

    Raises:
      UserError: no known Hugging Face architecture computes this model.
    """
    return _architecture(model).to_config(model, max_length)


def sources(model: ModelConfig) -> dict[Path, Source]:
    """The source of every parameter of a model, by its path in the model's state."""
    found: dict[Path, Source] = {}
    found["embedding", "table"] = Source((same("model.embed_tokens.weight"),), False)
    if model.norm != "srms":  # which has no weight
        found["final_norm", "weight"] = Source((same("model.norm.weight"),), False)
    if not model.tied_head:
        found["untied_head", "table"] = Source((same("lm_head.weight"),), False)
    layer, first = _architecture(model).layer, 0
    for number, (kinds, repeats) in enumerate(periods(model.layer_kinds())):
        for j, kind in enumerate(kinds):
            layers = [first + j + r * len(kinds) for r in range(repeats)]
            per_layer = [layer(model, kind, f"model.layers.{i}") for i in layers]
            for path in per_layer[0]:
                found["stack", "periods", number, "blocks", j, *path] = Source(
                    tuple(recipes[path] for recipes in per_layer), True
                )
        first += len(kinds) * repeats
    return found


def _architecture(model: ModelConfig) -> ModuleType:
    if not any(kind.startswith("lightning") for kind in model.layer_kinds()):
        return llama
    return transnormer if model.norm == "srms" else minimax
