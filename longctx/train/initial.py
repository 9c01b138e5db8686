"""Beginning a run with another model's parameters: adaptation and continued pretraining."""

import dataclasses
import pathlib

import jax
from jax.sharding import Mesh

from longctx.data.config import DataConfig
from longctx.errors import RunError, told_as
from longctx.hf import is_hf_folder, load_hf, read_hf_config, save_hf
from longctx.models.layers import by_layer, put_layers
from longctx.parallel.mesh import make_mesh
from longctx.train.checkpoint import Checkpoints
from longctx.train.config import RunConfig
from longctx.train.directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    check_directory,
    newest_step,
    read_config,
    write_config,
)
from longctx.train.restore import load_run
from longctx.train.step import TrainState, create_state


def source_config(source: pathlib.Path) -> RunConfig:
    """The run in `source`, or a run of the model in a Hugging Face folder, with its tokenizer.

    Raises:
      RunError: `source` is neither.
      UserError: a Hugging Face model that ours cannot express.
    """
    if not is_hf_folder(source):
        return read_config(source)
    tokenizer = source / "tokenizer.json"
    name = str(tokenizer) if tokenizer.is_file() else DataConfig.tokenizer
    return RunConfig(model=read_hf_config(source), data=DataConfig(tokenizer=name))


def run_from_hf(folder: pathlib.Path, out: pathlib.Path) -> None:
    """The model in a Hugging Face folder as a run in `out`, for `longctx eval` and `generate`.

    Raises:
      UserError: the folder cannot be imported.
      RunError: `out` is a file, or holds a checkpoint or a config.json that is no run's.
    """
    if newest_step(out) is not None:
        raise RunError(f"{out} already has a checkpoint: choose another --out")
    config, mesh = source_config(folder), make_mesh()
    check_directory(config, out)
    with jax.set_mesh(mesh):
        state, _ = begin_with(create_state(config, mesh), config, folder, mesh)
    write_config(config, out)
    checkpoints = Checkpoints(out / CHECKPOINTS, keep=1)
    checkpoints.save_model(0, state)
    checkpoints.close()


def run_to_hf(run: pathlib.Path, out: pathlib.Path) -> None:
    """The newest checkpoint of `run` as a Hugging Face folder in `out`.

    Raises:
      RunError: `run` has no checkpoint that can be read, or `out` is a file or holds a run.
      UserError: no known Hugging Face architecture computes its model.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: choose another --out")
    if (out / CONFIG_FILE).exists() and not is_hf_folder(out):
        raise RunError(f"{out} has the {CONFIG_FILE} of a run: choose another --out")
    loaded = load_run(run)
    length = loaded.config.data.sequence_length
    save_hf(loaded.config.model, loaded.params, out, max_length=length)


def begin_with(
    state: TrainState, config: RunConfig, source: pathlib.Path, mesh: Mesh
) -> tuple[TrainState, list[str]]:
    """`state` with the parameters that the model in `source` has too, layer by layer.

    Layers may be of another kind: what both kinds have is taken (softmax, window, tensorized and
    ring layers share all projections), the rest keeps its random values.

    Returns:
      the state, and the names of the parameters that `source` does not have.

    Raises:
      RunError: `source` holds no model, or parameters of other shapes.
    """
    if is_hf_folder(source):
        model, params = load_hf(source, mesh, param_dtype=config.model.param_dtype)
    else:
        loaded = load_run(source, mesh)
        model, params = loaded.config.model, loaded.params
    given = by_layer(model, params)
    with told_as(RunError, where=f"cannot begin with {source}"):
        taken = put_layers(config.model, state.params, given)
    own = by_layer(config.model, state.params)
    fresh = [".".join(map(str, path)) for path in own if path not in given]
    return dataclasses.replace(state, params=taken), fresh
