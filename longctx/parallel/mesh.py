"""The named mesh, and how an operator that XLA cannot partition runs on it."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

AXES = ("data", "fsdp", "seq", "tensor")
BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: `data` and `fsdp` split the batch, `seq` time, `tensor` heads."""

    data: int = 1  # devices that split the batch
    fsdp: int = 1  # devices that split the batch, the parameters and the optimizer's state
    seq: int = 1  # devices that split every sequence
    tensor: int = 1  # devices that split heads and MLP columns

    def __post_init__(self) -> None:
        for axis, size in self.shape.items():
            if size < 1:
                raise ValueError(f"mesh axis {axis}={size} must be at least 1")

    @property
    def shape(self) -> dict[str, int]:
        """Axis sizes by name, in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape.values())


def make_mesh(
    config: MeshConfig | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
    **sizes: int,
) -> Mesh:
    """The mesh of `config`, or of axis sizes given by name: `make_mesh(data=2, seq=4)`.

    The first `config.size` of `devices` (default: all devices) are used; neighbours along `seq`
    and `tensor` are the closest. Devices of several slices, which a slower network joins, are cut
    along the outermost axes that allow it: along `data` if it is as large as their number. Nothing
    global is set: use it with `jax.set_mesh`.

    Raises:
      ValueError: there are fewer devices than `config` needs, or processes without a device in
        the mesh, or it would use more devices of one slice than of another.
      TypeError: both a config and sizes are given, or a size names no axis.
    """
    if config is not None and sizes:
        raise TypeError(f"give a MeshConfig or axis sizes, not both: {config}, {sizes}")
    config = config or MeshConfig(**sizes)
    available = jax.devices() if devices is None else list(devices)
    if config.size > len(available):
        raise ValueError(f"{config} needs {config.size} devices, there are {len(available)}")
    chosen = available[: config.size]
    if devices is None and len({d.process_index for d in chosen}) < jax.process_count():
        raise ValueError(
            f"{config} uses {config.size} of the {len(available)} devices of "
            f"{jax.process_count()} processes: every process must have one in the mesh"
        )
    arranged = _arrange(config, chosen)
    return Mesh(arranged, AXES, axis_types=(axis_type,) * len(AXES))


def _arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of the mesh's shape, near ones near each other."""
    sizes = tuple(config.shape.values())
    of_slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    slices = left = len(of_slices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if len(set(of_slices.values())) > 1:
        used = [*of_slices.values()]
        raise ValueError(
            f"{config} uses {used} devices of {slices} slices: it must use as many of each"
        )
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // n for size, n in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """The rows of a batch that this process needs, as (part, parts): rows [part, part + 1) / parts.

    (0, 1), all rows, where the devices of processes do not cut the batch into even parts: for
    instance when all of them lie along `seq`.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    row_of = np.arange(rows).repeat(mesh.size // rows)
    processes = np.array([device.process_index for device in mesh.devices.flat])
    held = {p: sorted({*row_of[processes == p].tolist()}) for p in processes.tolist()}
    parts = {tuple(block) for block in held.values()}
    size = rows // len(parts)
    if parts != {tuple(range(i * size, (i + 1) * size)) for i in range(len(parts))}:
        return 0, 1
    return held[jax.process_index()][0] // size, len(parts)


def fitting_sharding(spec: P | None, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`spec` on `mesh`, with array axes that a mesh axis does not divide kept whole."""
    return NamedSharding(mesh, fitting(spec or P(), shape, mesh.shape))


def fitting(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """`spec` over mesh axes of these sizes; others count as size 1.

    Of the mesh axes of an array axis only so many, from the first, are taken as divide it.
    """

    def keep(size: int, entry: Any) -> tuple[str, ...] | None:
        names = tuple(name for name in mesh_axes(entry) if name in sizes)
        while size % math.prod(sizes[name] for name in names):
            names = names[:-1]
        return names or None

    return P(*(keep(size, entry) for size, entry in zip(shape, spec, strict=False)))


def place_explicit(x: Array, spec: P) -> Array:
    """`x` split by `spec` over the Explicit axes of the mesh in use, where operations want it so.

    What they make of it over Auto axes XLA finds out by itself.
    """
    explicit = free_sizes(jax.sharding.get_abstract_mesh().explicit_axes)
    return jax.sharding.reshard(x, fitting(spec, x.shape, explicit)) if explicit else x


def free_sizes(axes: Sequence[str]) -> dict[str, int]:
    """Sizes of those of the axes of the mesh in use that are not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in axes if name not in mesh.manual_axes}


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one array axis, as a PartitionSpec has them."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _restrict(spec: P, axes: Container[str]) -> P:
    """`spec` without the mesh axes that are not in `axes`."""

    def keep(entry: Any) -> tuple[str, ...] | None:
        return tuple(name for name in mesh_axes(entry) if name in axes) or None

    return P(*map(keep, spec))


def _restrict_all(specs: Any, axes: Container[str]) -> Any:
    return jax.tree.map(lambda s: _restrict(s, axes), specs)


def _check(x: Any, spec: P) -> None:
    for size, axes in zip(x.shape, spec, strict=False):
        devices = free_size(axes)
        if size % devices:
            raise ValueError(
                f"{size} of an array's shape {x.shape} must be a multiple of the {devices} devices "
                f"along {axes}"
            )


def shard_operator[Out](
    function: Callable[..., Out], in_specs: Any, out_specs: Any
) -> Callable[..., Out]:
    """`function` on the local shards of its arguments, over the mesh in context.

    A Pallas kernel is opaque to XLA's partitioner: under plain `jit` with sharded operands a TPU
    kernel is refused, and a GPU kernel silently gathers its operands and computes everything on
    every device. Wrapped here it runs once per device, on that device's shard.

    The mesh is the one of `jax.set_mesh`; without a mesh `function` is called as it is. Inside a
    `shard_map` only the axes that are not yet manual are mapped, so an operator also works in a
    user's own `shard_map`, over all axes or over some. Axes that the mesh lacks count as size 1.
    Operands on Explicit axes are resharded to `in_specs` first, which is free if they are so
    already. Inside a `shard_map` over some axes a backward pass runs `function` forward again.

    Args:
      function: takes positional arrays (or None) and sees local shards.
      in_specs: one PartitionSpec per argument, or a tree prefix of specs.
      out_specs: tree prefix of specs of the result.

    Raises:
      ValueError: an operand cannot be cut into equal shards.
    """

    def call(*args: Any) -> Out:
        mesh = jax.sharding.get_abstract_mesh()
        free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
        if not free:
            return function(*args)
        local_in, local_out = _restrict_all(in_specs, free), _restrict_all(out_specs, free)
        jax.tree.map(
            lambda spec, tree: jax.tree.map(lambda x: _check(x, spec), tree), local_in, args
        )
        args = jax.tree.map(
            lambda spec, tree: jax.tree.map(lambda x: place_explicit(x, spec), tree), in_specs, args
        )
        # What JAX saves of a nested shard_map names the outer axes, which it then refuses.
        local = jax.checkpoint(function) if mesh.manual_axes else function
        return jax.shard_map(local, in_specs=local_in, out_specs=local_out, axis_names=free)(*args)

    return call


def sequence_axis(axis: str | None) -> tuple[int, bool]:
    """Devices along `axis`, and whether we are inside a shard_map over it.

    Without a mesh, or an axis, the sequence lies on one device: (1, False).

    Raises:
      ValueError: there is a mesh, and it lacks the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis is None:
        return 1, False
    if axis not in mesh.axis_names:
        raise ValueError(f"{axis=} is not an axis of the mesh in use, {mesh.axis_names}")
    return mesh.shape[axis], axis in mesh.manual_axes


def free_size(axes: str | tuple[str, ...] | None) -> int:
    """Devices over which `shard_operator` would split an array dimension over `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    free = (name for name in mesh_axes(axes) if name not in mesh.manual_axes)
    return math.prod(mesh.shape.get(name, 1) for name in free)
