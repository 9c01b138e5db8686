"""Parameters by layer, whatever periods the layers are stacked in."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from longctx.models.config import ModelConfig, periods

type Path = tuple[Any, ...]  # names and indices, as in an `nnx.State`


def layer_paths(config: ModelConfig) -> dict[tuple[int, int], tuple[int, ...]]:
    """The layers that are repeats of one block, by (number of the period, block in it)."""
    found, first = {}, 0
    for number, (kinds, repeats) in enumerate(periods(config.layer_kinds())):
        for j in range(len(kinds)):
            found[number, j] = tuple(first + j + r * len(kinds) for r in range(repeats))
        first += len(kinds) * repeats
    return found


def by_layer(config: ModelConfig, params: nnx.State) -> dict[Path, Array]:
    """Every parameter under its path, those of the stack apart: ("layers", i, "mixer", ...)."""
    layers: Mapping[Any, tuple[int, ...]] = layer_paths(config)
    found = {}
    for path, variable in nnx.to_flat_state(params):
        if path[0] != "stack":
            found[path] = variable[...]
            continue
        _, _, number, _, j, *rest = path
        for place, layer in enumerate(layers[number, j]):
            found["layers", layer, *rest] = variable[...][place]
    return found


def put_layers(config: ModelConfig, params: nnx.State, values: Mapping[Path, Array]) -> nnx.State:
    """`params` with the values that `by_layer` names, where there are any.

    Dtypes and shardings stay those of `params`.

    Raises:
      ValueError: a value has another shape than its parameter; all such are named.
    """
    layers = layer_paths(config)
    wrong = []

    def filled(path: Path, variable: nnx.Variable) -> nnx.Variable:
        old = variable[...]

        def value(name: Path, kept: Array) -> Array:
            new = values.get(name, kept)
            if new.shape != kept.shape:
                wrong.append(f"{'.'.join(map(str, name))} {new.shape}, not {kept.shape}")
                return kept
            return new.astype(kept.dtype)

        if path[0] == "stack":
            _, _, number, _, j, *rest = path
            names = [("layers", layer, *rest) for layer in layers[number, j]]
            if not any(name in values for name in names):
                return variable
            new = jnp.stack([value(n, x) for n, x in zip(names, old, strict=True)])
        else:
            new = value(path, old)
        return variable.replace(jax.device_put(new, old.sharding))

    flat = [(path, filled(path, variable)) for path, variable in nnx.to_flat_state(params)]
    if wrong:
        raise ValueError(f"parameters of other shapes: {'; '.join(wrong)}")
    return nnx.from_flat_state(flat)
