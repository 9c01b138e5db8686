"""Safetensors folders in and out, one tensor at a time."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from longctx.errors import UserError, told_as
from longctx.hf.architectures import from_hf, sources, to_hf
from longctx.hf.recipe import Source
from longctx.models import ModelConfig, build
from longctx.parallel.mesh import fitting_sharding, make_mesh

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Buffers that some checkpoints carry and that follow from the configuration.
DERIVED = (
    "rotary_emb.inv_freq",
    "model.slopes",
    "lrpe.index",
    "self_attn.slope_rate",
    "self_attn.query_decay",
    "self_attn.key_decay",
    "self_attn.diagonal_decay",
)
FILE_BYTES = 5 * 10**9


class Tensors:
    """The tensors of a folder by name, read when they are asked for.

    Raises:
      UserError: a file is missing or broken.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        from safetensors import SafetensorError, safe_open  # extra `hf`

        self._files = {}
        for file in _tensor_files(folder):
            try:
                self._files[file] = safe_open(str(file), "numpy")
            except SafetensorError as error:
                raise UserError(f"{file} is not a complete safetensors file: {error}") from error
        self._where = {name: file for file, f in self._files.items() for name in f.keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        """All names."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._where[name]].get_tensor(name)


def _tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that the index names, without one the usual one, or all there are.

    Folders may hold the same weights once more, in another layout.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} lacks 'weight_map', the file of each tensor")
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {', '.join(absent)}, named in its {INDEX}")
        return [folder / name for name in names]
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors files")
    return files


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    with told_as(UserError, where=f"{path} is not JSON"):  # nor are bytes that are not UTF-8
        found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


def is_hf_folder(folder: pathlib.Path) -> bool:
    """Whether `folder` has the config.json of a Hugging Face model (a run's looks different).

    Raises:
      UserError: its config.json cannot be read.
    """
    path = folder / "config.json"
    return path.is_file() and "model_type" in _read_json(path)


def read_hf_config(folder: pathlib.Path) -> ModelConfig:
    """The model in a Hugging Face folder.

    Raises:
      UserError: there is no config.json, it is broken, or ours cannot express what it says.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json")
    described = _read_json(path)
    with told_as(UserError, where=str(path)):
        return from_hf(described)


def load_hf(
    folder: pathlib.Path, mesh: Mesh | None = None, *, param_dtype: str = "float32"
) -> tuple[ModelConfig, nnx.State]:
    """Configuration and parameters of a Hugging Face folder, laid out on `mesh`.

    Tensors are read one by one and only where a device of this process holds part of them.

    Args:
      folder: config.json and safetensors files, also several with an index.
      mesh: where the parameters go; default one device.
      param_dtype: of the parameters, whatever the files hold.

    Raises:
      UserError: a file that is broken, an architecture that ours cannot express, or weights that
        are missing, unknown or of the wrong shape; all of them in one message.
    """
    config = read_hf_config(folder)
    config = dataclasses.replace(config, param_dtype=param_dtype)
    tensors, recipes = Tensors(folder), sources(config)
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    _check(tensors, recipes, {p: v.shape for p, v in flat.items()}, tied=config.tied_head)
    mesh = mesh or make_mesh()
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(state)))
    filled = []
    for name, variable in flat.items():
        sharding = fitting_sharding(specs[name].get_value(), variable.shape, mesh)
        array = _assemble(tensors, recipes[name], variable.shape, variable.dtype, sharding)
        filled.append((name, variable.replace(array)))
    return config, nnx.from_flat_state(filled)


def save_hf(
    config: ModelConfig, params: nnx.State, folder: pathlib.Path, *, max_length: int
) -> None:
    """Write a model as a Hugging Face folder: config.json, and tensors in the parameters' dtype.

    Files hold at most 5 GB each; with several there is an index.

    Raises:
      UserError: no known Hugging Face architecture computes this model.
    """
    described = to_hf(config, max_length)
    flat, recipes = dict(nnx.to_flat_state(params)), sources(config)
    described["dtype"] = str(next(iter(flat.values())).dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    files = _Files(folder)
    for name, variable in flat.items():
        for tensor, value in _taken_apart(recipes[name], variable[...]):
            files.add(tensor, value)
    files.close()


class _Files:
    """Safetensors files of limited size, and the index over them if there are several."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder, self._full, self._open = folder, [], {}
        self._weight_map: dict[str, int] = {}
        self._total = 0

    def add(self, name: str, value: np.ndarray) -> None:
        """Put one tensor into the current file, or into a new one."""
        if self._open and sum(x.nbytes for x in self._open.values()) + value.nbytes > FILE_BYTES:
            self._write()
        self._open[name] = value
        self._weight_map[name] = len(self._full)
        self._total += value.nbytes

    def _write(self) -> None:
        from safetensors.numpy import save_file  # extra `hf`

        path = self._folder / f"part-{len(self._full)}.safetensors"
        save_file(self._open, path, metadata={"format": "pt"})
        self._full.append(path)
        self._open = {}

    def close(self) -> None:
        """Write what is left, name the files by their number, and add the index."""
        self._write()
        count = len(self._full)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [SINGLE]
        for path, name in zip(self._full, names, strict=True):
            path.rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: names[i] for tensor, i in self._weight_map.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check(
    tensors: Tensors,
    recipes: Mapping[Any, Source],
    shapes: Mapping[Any, tuple[int, ...]],
    *,
    tied: bool,
) -> None:
    """Name everything that is wrong with the weights, at once."""
    names = {n for source in recipes.values() for recipe in source.recipes for n in recipe.names}
    missing = sorted(names - tensors.names())
    spare = {"lm_head.weight"} if tied else set()  # some write a tied head all the same
    extra = sorted(n for n in tensors.names() - names - spare if not n.endswith(DERIVED))
    misshapen = []
    for path, source in recipes.items():
        wanted = shapes[path][1:] if source.stacked else shapes[path]
        blank = np.broadcast_to(np.zeros((), np.int8), wanted)
        for recipe in source.recipes:
            for name, part in zip(recipe.names, recipe.split(blank), strict=True):
                if name in tensors.names() and tensors.shape(name) != part.shape:
                    misshapen.append(f"{name} {tensors.shape(name)} (must be {part.shape})")
    problems = {"missing": missing, "unknown": extra, "misshapen": misshapen}
    said = [f"{kind}: {', '.join(found)}" for kind, found in problems.items() if found]
    if said:
        raise UserError(f"weights do not fit the configuration; {'; '.join(said)}")


def _assemble(
    tensors: Tensors,
    source: Source,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding,
) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "JAX passes None for scalars only"
        if not source.stacked:
            return _joined(tensors, source.recipes[0])[index].astype(dtype)
        layers = source.recipes[index[0]]
        return np.stack([_joined(tensors, r)[index[1:]].astype(dtype) for r in layers])

    return jax.make_array_from_callback(shape, sharding, part)


def _joined(tensors: Tensors, recipe: Any) -> np.ndarray:
    return recipe.join([tensors[name] for name in recipe.names])


def _taken_apart(source: Source, value: jax.Array) -> Iterator[tuple[str, np.ndarray]]:
    layers = value if source.stacked else value[None]
    for recipe, layer in zip(source.recipes, layers, strict=True):
        for name, part in zip(recipe.names, recipe.split(np.asarray(layer)), strict=True):
            yield name, np.ascontiguousarray(part)
