"""Mesh axis names of the modules, and parameters that carry them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta as linen_meta
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from longctx.parallel.mesh import mesh_axes
from longctx.parallel.placement import place

type AxisName = str | None
type AxisNames = AxisName | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes that a module's arrays are split over; None: not split.

    Parameters are split over `fsdp`, which may be several axes, and `tensor`, activations over
    `batch` and `seq`, heads and MLP features over `tensor`. Axes that the mesh in use lacks count
    as size 1, but for `seq`: a mesh that lacks it wants `seq=None`.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    fsdp: AxisNames = "fsdp"
    seq: AxisName = "seq"
    tensor: AxisName = "tensor"

    @property
    def operator(self) -> dict[str, Any]:
        """The names, as the operators of `longctx.parallel` call them."""
        return {"axis": self.seq, "batch_axes": self.batch, "head_axis": self.tensor}

    @property
    def columns(self) -> tuple[str, ...]:
        """The axes that split an embedding's columns: of `fsdp` those that do not split time."""
        return tuple(name for name in mesh_axes(self.fsdp) if name != self.seq)

    def rows(self, count: int) -> tuple[AxisNames, ...]:
        """How the first `count` axes of activations are split: batch, time, no further one."""
        return (self.batch, self.seq, *(None,) * count)[:count]

    def with_parameters_over_seq(self) -> "Axes":
        """The same, with the parameters of projections split over `seq`, too."""
        return dataclasses.replace(self, fsdp=self.columns + mesh_axes(self.seq))

    @property
    def hidden(self) -> P:
        """Spec of the residual stream, [B, T, M], between blocks and so of what they save.

        Along `tensor`, too, every device keeps its own tokens, gathered before the projections
        and summed by a reduce-scatter after them (2205.05198, sequence parallelism).
        """
        return P(self.batch, tuple(name for name in (self.seq, self.tensor) if name), None)


DEFAULT_AXES = Axes()


def split_over(spec: Sequence[AxisNames]) -> dict[str, Any]:
    """Metadata of a variable that is split over the named mesh axes, wherever it is created.

    `nnx.get_partition_spec` reads the names, in Linen `flax.linen.get_partition_spec`; nothing is
    placed here, so that a module can be made without a mesh, under `jit` with output shardings,
    or abstractly.
    """
    return {
        "out_sharding": tuple(spec),
        "eager_sharding": False,
        "linen_meta_type": linen_meta.Partitioned,
    }


def parameter(
    initializer: Callable[..., Array],
    shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    spec: Sequence[AxisNames],
    rngs: nnx.Rngs,
) -> nnx.Param[Array]:
    """A parameter that knows how it is split."""
    return nnx.Param(initializer(rngs.params(), tuple(shape), dtype), **split_over(spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: Array, kept: P, used: P) -> Array:
    """`weight` split by `used`, right before use, its gradient by `kept`.

    So XLA gathers weights, in the compute dtype, and never activations; and gradients are
    scattered as they are summed. (The gradient of `place` alone would be whole on every device.)
    """
    return place(weight, used)


def _gather_forward(weight: Array, kept: P, used: P) -> tuple[Array, None]:
    return place(weight, used), None


def _gather_backward(kept: P, used: P, _: None, gradient: Array) -> tuple[Array]:
    return (place(gradient, kept),)


gather.defvjp(_gather_forward, _gather_backward)
