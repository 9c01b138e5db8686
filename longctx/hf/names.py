"""Which Hugging Face tensors make up each of our parameters, and how."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longctx.models import ModelConfig
from longctx.models.config import periods

type Path = tuple[Any, ...]  # names and indices, as in an `nnx.State`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One layer's value of a parameter from `names`, tensors of a checkpoint, and back."""

    names: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter: one recipe, or one per repeat of its segment, stacked on a leading axis."""

    recipes: tuple[Recipe, ...]
    stacked: bool


def same(name: str) -> Recipe:
    """The tensor as it is."""
    return Recipe((name,), lambda xs: xs[0], lambda x: [x])


def kernel(name: str) -> Recipe:
    """A weight [out, in] as our kernel [in, out]."""
    return Recipe((name,), lambda xs: xs[0].T, lambda x: [x.T])


def kernels(*names: str) -> Recipe:
    """Several weights [out, in] as one fused kernel [in, n, out]."""
    return Recipe(
        names,
        lambda xs: np.stack([x.T for x in xs], axis=1),
        lambda x: [x[:, i].T for i in range(len(names))],
    )


def fused(name: str, parts: int) -> Recipe:
    """A weight [parts * out, in] as our kernel [in, parts, out]."""
    return Recipe(
        (name,),
        lambda xs: xs[0].T.reshape(xs[0].shape[1], parts, -1),
        lambda x: [x.reshape(x.shape[0], -1).T],
    )


def angles(name: str) -> Recipe:
    """TransNormerLLM's theta [H, 1, D] as ours [H, D]."""
    return Recipe((name,), lambda xs: xs[0][:, 0], lambda x: [x[:, None]])


def _llama_layer(prefix: str) -> dict[Path, Recipe]:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return {
        ("mixer", "query", "kernel"): kernels(f"{attention}.q_proj.weight"),
        ("mixer", "key_value", "kernel"): kernels(
            f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"
        ),
        ("mixer", "output", "kernel"): kernel(f"{attention}.o_proj.weight"),
        ("mlp", "expand", "kernel"): kernels(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        ("mlp", "contract", "kernel"): kernel(f"{mlp}.down_proj.weight"),
        ("mixer_norm", "weight"): same(f"{prefix}.input_layernorm.weight"),
        ("mlp_norm", "weight"): same(f"{prefix}.post_attention_layernorm.weight"),
    }


def _transnormer_layer(prefix: str) -> dict[Path, Recipe]:
    mixer, mlp = f"{prefix}.token_mixer", f"{prefix}.channel_mixer"
    return {
        ("mixer", "project", "kernel"): fused(f"{mixer}.qkvu_proj.weight", 4),
        ("mixer", "output", "kernel"): kernel(f"{mixer}.out_proj.weight"),
        ("mixer", "lrpe", "theta"): angles(f"{mixer}.lrpe.theta"),
        ("mlp", "expand", "kernel"): kernels(f"{mlp}.l1.weight", f"{mlp}.l2.weight"),
        ("mlp", "contract", "kernel"): kernel(f"{mlp}.l3.weight"),
    }


def sources(model: ModelConfig) -> dict[Path, Source]:
    """The source of every parameter of a model, by its path in the model's state."""
    softmax = not model.mixers[0].startswith("lightning")
    layer_recipes = _llama_layer if softmax else _transnormer_layer
    found: dict[Path, Source] = {}
    found["embedding", "table"] = Source((same("model.embed_tokens.weight"),), False)
    if softmax:
        found["final_norm", "weight"] = Source((same("model.norm.weight"),), False)
    if not model.tied_head:
        found["untied_head", "table"] = Source((same("lm_head.weight"),), False)
    first = 0
    for number, (kinds, repeats) in enumerate(periods(model.layer_kinds())):
        for j, kind in enumerate(kinds):
            layers = [first + j + r * len(kinds) for r in range(repeats)]
            per_layer = [layer_recipes(f"model.layers.{i}") for i in layers]
            for path in per_layer[0]:
                if "lrpe" in path and not kind.endswith("+lrpe"):
                    continue
                found["stack", "periods", number, "blocks", j, *path] = Source(
                    tuple(recipes[path] for recipes in per_layer), True
                )
        first += len(kinds) * repeats
    return found
