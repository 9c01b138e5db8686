"""Weights that the devices along a sequence hold parts of, gathered for all layers at once.

Every device multiplies its tokens by its own copy of a weight, whose gradient is a sum over the
devices: each sends every other its part of it, and owners add what arrives in float32. GPUs of one
process copy it from memory to memory, which takes no cores from the products beside it; a
reduce-scatter by NCCL does. Several processes, and TPUs, have no such copies: they reduce-scatter.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from longctx.compiler import copies_between_memories
from longctx.parallel.mesh import fitting, mesh_axes
from longctx.parallel.placement import place


@dataclasses.dataclass(frozen=True)
class Cut:
    """A weight whose dimension `dim` lies in parts on `parts` devices, `devices` along `axis`."""

    axis: str
    devices: int
    parts: int
    dim: int
    kept: P  # of a layer's weight, in parts
    used: P  # and whole

    def gather(self, stacked: Float[Array, "L ..."]) -> Float[Array, "P L ..."]:
        """All layers on every device; parts stay apart, so that none has to move to its place."""
        shape, dim = stacked.shape, self.dim + 1
        apart = stacked.reshape(*shape[:dim], self.parts, -1, *shape[dim + 1 :])
        return place(jnp.moveaxis(apart, dim, 0), P(None, None, *self.used))

    def layer(self, gathered: Float[Array, "P ..."]) -> Float[Array, "..."]:
        """The weight of one layer from its parts."""
        apart = jnp.moveaxis(gathered, 0, self.dim)
        shape = apart.shape
        return apart.reshape(*shape[: self.dim], -1, *shape[self.dim + 2 :])

    def product(
        self, x: Float[Array, "B T M"], copies: Float[Array, "N M ..."]
    ) -> Float[Array, "B T ..."]:
        """Each device's tokens times its copy."""

        def local(x: Array, copy: Array) -> Array:
            return jnp.tensordot(x, copy[0], axes=1)

        tokens = P(None, self.axis)
        return jax.shard_map(
            local, in_specs=(tokens, P(self.axis)), out_specs=tokens, axis_names={self.axis}
        )(x, copies)


class Gathered(nnx.Variable):
    """A weight of stacked layers, [P, L, ...], part after part, the same on all devices."""

    cut: Cut


def cut_of(shape: tuple[int, ...], kept: P, used: P, axis: str | None) -> Cut | None:
    """How a weight kept by `kept` is cut along `axis` of the mesh in use.

    None if it is not, or if XLA does not place its parts: in a shard_map, or on Explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis is None or axis not in mesh.auto_axes or axis in mesh.manual_axes:
        return None
    sizes = mesh.shape
    for dim, entry in enumerate(fitting(kept, shape, sizes)):
        names = mesh_axes(entry)
        if axis in names and sizes[axis] > 1:
            parts = math.prod(sizes[name] for name in names)
            return Cut(axis, sizes[axis], parts, dim, kept, used)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def copies(cut: Cut, kernel: Float[Array, "..."], gathered: Float[Array, "P ..."]) -> Array:
    """A copy of a layer's weight for each device along the sequence, [N, ...].

    Made from `gathered`; its gradient is that of `kernel`, in parts.
    """
    copy = jnp.broadcast_to(cut.layer(gathered), (cut.devices, *kernel.shape))
    return place(copy, P(cut.axis, *cut.used))


def _copies_forward(cut: Cut, kernel: Array, gathered: Array) -> tuple[Array, None]:
    return copies(cut, kernel, gathered), None


def _copies_backward(cut: Cut, _: None, gradients: Float[Array, "N ..."]) -> tuple[Array, None]:
    shape = gradients.shape[1:]
    # The devices along the sequence hold neighbouring parts.
    split = (cut.parts // cut.devices, cut.devices, shape[cut.dim] // cut.parts)
    apart = gradients.reshape(cut.devices, *shape[: cut.dim], *split, *shape[cut.dim + 1 :])
    owners = cut.dim + 1

    def local(gradient: Array) -> Array:
        return _sum_to_owners(gradient[0], cut.axis, owners)

    out = P(*(None,) * owners, cut.axis)
    summed = jax.shard_map(local, in_specs=P(cut.axis), out_specs=out, axis_names={cut.axis})(apart)
    return place(summed.reshape(shape), cut.kept), None


copies.defvjp(_copies_forward, _copies_backward)


def _sum_to_owners(gradient: Array, axis: str, dim: int) -> Array:
    """The sum over the devices along `axis` of the part, along `dim`, that this device owns."""
    if not copies_between_memories():
        return lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
    rank, devices = lax.axis_index(axis), lax.axis_size(axis)

    def part(owner: Array) -> Array:
        return lax.dynamic_index_in_dim(gradient, owner % devices, dim)

    total = part(rank).astype(jnp.float32)
    for hop in range(1, devices):
        onwards = [(p, (p + hop) % devices) for p in range(devices)]
        total += lax.ppermute(part(rank + hop), axis, onwards)
    return total.astype(gradient.dtype)
