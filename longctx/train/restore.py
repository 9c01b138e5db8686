"""A trained run, ready to be evaluated or to generate."""

import dataclasses
import pathlib

from flax import nnx
from jax.sharding import Mesh

from longctx.errors import RunError
from longctx.models import Decoder
from longctx.parallel.mesh import make_mesh
from longctx.train.checkpoint import Checkpoints
from longctx.train.config import RunConfig
from longctx.train.directory import CHECKPOINTS, read_config
from longctx.train.step import abstract_state, model_graph


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The newest readable checkpoint of a run."""

    config: RunConfig
    step: int
    graph: nnx.GraphDef
    params: nnx.State
    rest: nnx.State

    @property
    def model(self) -> Decoder:
        """The model with its trained parameters."""
        return nnx.merge(self.graph, self.params, self.rest)


def load_run(run: pathlib.Path, mesh: Mesh | None = None) -> LoadedRun:
    """Load configuration and model of the run in directory `run`, onto `mesh` (default: 1 device).

    The model takes tokens in their own order, whatever the layout in which it was trained. What
    "usp" needs to know of the training mesh is dropped: "auto" takes its place.

    Raises:
      RunError: `run` is not a run, or has no checkpoint that can be read.
    """
    config = read_config(run)
    checkpoints = Checkpoints(run / CHECKPOINTS)
    found = checkpoints.restore_model(abstract_state(config, mesh or make_mesh()))
    checkpoints.close()
    if found is None:
        raise RunError(f"{run} has no checkpoint yet")
    step, params, rest = found
    in_order = dataclasses.replace(config.parallel, layout="contiguous", ranks=0)
    if in_order.strategy == "usp":
        in_order = dataclasses.replace(in_order, strategy="auto", head_groups=1)
    graph = model_graph(dataclasses.replace(config, parallel=in_order))
    return LoadedRun(config, step, graph, params, rest)
