"""Meshes of devices that are not there, for tests that compile ahead of time."""

import math

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from longctx.topologies import gpu_compiler_missing, topology_devices

# The smallest slice of each generation.
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def tpu_mesh(generation: str, shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the first devices of a TPU slice, for `jit(...).lower(...).compile()`."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    return _mesh(TPUS[generation], shape, axis_type)


def gpu_mesh(shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of H100s, for `jit(...).lower(...).compile()`."""
    if missing := gpu_compiler_missing():
        pytest.skip(f"cannot compile for GPUs: {missing}")
    return _mesh(f"h100:{math.prod(shape.values())}", shape, axis_type)


def _mesh(topology: str, shape: dict[str, int], axis_type: AxisType) -> Mesh:
    devices = topology_devices(topology)[: math.prod(shape.values())]
    arranged = np.array(devices).reshape(*shape.values())
    return Mesh(arranged, tuple(shape), axis_types=(axis_type,) * len(shape))
