"""The state of a run and the function that advances it by one optimizer step."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.compiler import training_options
from longctx.eval.nll import MODEL_FIELDS, token_nll
from longctx.models import build
from longctx.nn.draw import redraw
from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import BATCH, batch_share, fitting_sharding
from longctx.train.config import RunConfig
from longctx.train.optim import make_optimizer, schedule

type Batch = dict[str, Int[Array, "B T"]]
type Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes."""

    step: Int[Array, ""]  # steps done
    params: nnx.State
    rest: nnx.State  # variables that are not trained: constants, random streams
    moments: optax.OptState


def model_graph(config: RunConfig) -> nnx.GraphDef:
    """The model's structure, which `nnx.merge` joins with its variables."""
    return nnx.eval_shape(lambda: nnx.split(_build(config))[0])


def _build(config: RunConfig) -> nnx.Module:
    return build(config.model, parallel=config.parallel, rngs=nnx.Rngs(config.train.seed))


def initial_state(config: RunConfig) -> TrainState:
    """The state before the first step."""
    _, params, rest = nnx.split(_build(config), nnx.Param, ...)
    moments = make_optimizer(config.optim, config.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, rest, moments)


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Moments lie where their parameters lie. An axis that a mesh axis does not divide is kept whole.
    """
    shapes = jax.eval_shape(lambda: initial_state(config))
    specs = nnx.get_partition_spec(shapes)

    def place(shape: jax.ShapeDtypeStruct, spec: P | None) -> jax.ShapeDtypeStruct:
        sharding = fitting_sharding(spec, shape.shape, mesh)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    leaves, structure = jax.tree.flatten(shapes)
    spec_leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P) or x is None)
    placed = [place(s, p) for s, p in zip(leaves, spec_leaves, strict=True)]
    return jax.tree.unflatten(structure, placed)


def create_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """`initial_state` on the mesh, each device computing its own part."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: initial_state(config), out_shardings=shardings)()


def put_batch(batch: dict[str, Any], mesh: Mesh, layout: Layout | Kind = "contiguous") -> Batch:
    """This process's share of a batch as global arrays, tokens in the order of `layout`.

    `batch` has the rows that `batch_share(mesh)` names, whole: the process may hold some of their
    tokens only.
    """
    sharding, order = NamedSharding(mesh, P(BATCH, "seq")), as_layout(layout, mesh.shape["seq"])
    part, parts = batch_share(mesh)

    def whole(rows: np.ndarray) -> Array:
        laid_out, first = order.apply(rows), part * len(rows)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every shard has its place"
            start, stop, _ = index[0].indices(parts * len(rows))
            return laid_out[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((parts * len(rows), rows.shape[1]), sharding, shard)

    return {f: whole(batch[f]) for f in MODEL_FIELDS}


def make_train_step(config: RunConfig) -> jax.stages.Wrapped:
    """The jitted step (TrainState, Batch) -> (TrainState, Metrics); it consumes the state given.

    It is compiled for the devices of the mesh in use.

    The loss is the mean over the batch's targets. With accumulation the batch is cut into slices
    of interleaved rows, so that every device keeps its own rows, and their gradients are added.
    """
    graph = model_graph(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    learning_rate = schedule(config.optim, config.train.steps)

    def loss(
        params: nnx.State, rest: nnx.State, batch: Batch, count: Int[Array, ""]
    ) -> tuple[Float[Array, ""], nnx.State]:
        model = nnx.merge(graph, params, rest)
        total = jnp.sum(token_nll(model, batch))
        return total / count, redraw(nnx.state(model, nnx.Not(nnx.Param)))

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulate(state: TrainState, batch: Batch) -> tuple[Array, nnx.State, nnx.State]:
        count = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1)
        slices = config.train.accumulation
        if slices == 1:
            (total, rest), grads = gradient(state.params, state.rest, batch, count)
            return total, rest, grads

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            total, rest, grads = carry
            (value, rest), new = gradient(state.params, rest, part, count)
            return (total + value, rest, jax.tree.map(jnp.add, grads, new)), None

        parts = jax.tree.map(lambda x: x.reshape(-1, slices, x.shape[-1]).swapaxes(0, 1), batch)
        start = (jnp.zeros(()), state.rest, jax.tree.map(jnp.zeros_like, state.params))
        return jax.lax.scan(add, start, parts)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total, rest, grads = accumulate(state, batch)
        updates, moments = optimizer.update(grads, state.moments, state.params)
        metrics = {
            "loss": total,
            "grad_norm": jnp.asarray(optax.global_norm(grads)),
            "learning_rate": jnp.asarray(learning_rate(state.step)),
        }
        params = cast(nnx.State, optax.apply_updates(state.params, updates))
        return TrainState(state.step + 1, params, rest, moments), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=training_options())
