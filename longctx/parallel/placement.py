"""How arrays are split over the mesh in use: over Auto axes by XLA, over Explicit ones by type."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from longctx.parallel.mesh import fitting, free_sizes, place_explicit


def place(x: Array, spec: P) -> Array:
    """`x` split by `spec` over the axes of the mesh in use; `x` itself without a mesh.

    Of the mesh axes of an array axis only so many, from the first, are taken as divide it.
    """
    x = place_explicit(x, spec)
    free = free_sizes(jax.sharding.get_abstract_mesh().auto_axes)
    if not free:
        return x
    spec = fitting(spec, x.shape, free)
    if not isinstance(x, jax.core.Tracer):  # it may lie on one device, where no constraint helps
        return jax.device_put(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def placed_by_xla(function: Callable[..., Array], *args: Array, split: P) -> Array:
    """`function(*args)`, a product, look-up or write; split by `split` over Explicit axes.

    There JAX asks how a result is split whose operands are split along what is summed over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = free_sizes(mesh.explicit_axes)
    if not explicit:
        return function(*args)
    args = tuple(place_explicit(x, split_of(x)) for x in args)  # also those from before the mesh
    automatic = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        plain = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args)
        spec = fitting(split, jax.eval_shape(function, *plain).shape, explicit)
    run = jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=spec)
    return cast(Callable[..., Array], run)(*args)


def spread(x: Array, like: Array) -> Array:
    """`x` broadcast to the shape of `like`, and split as that is over Explicit axes.

    There its gradient is summed on each device first; it would be gathered to be summed.
    """
    explicit = free_sizes(jax.sharding.get_abstract_mesh().explicit_axes)
    split = fitting(split_of(like), like.shape, explicit) if explicit else None
    return jnp.broadcast_to(x, like.shape, out_sharding=split)


def split_of(x: Array) -> P:
    """How `x` is split over Explicit axes."""
    return jax.typeof(x).sharding.spec
