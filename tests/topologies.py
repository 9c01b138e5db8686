"""Ahead-of-time compilation for devices that are not there.

libtpu describes TPUs and compiles for them; the CUDA plugin compiles for H100s, with ptxas from the
machine's CUDA toolkit.
"""

import math
import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from experiments.bench.ring.topology import gpu_compiler_missing, h100s

# Name and layout of the smallest slice, by generation.
TPUS = {
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
    "tpu7x": {"topology_name": "tpu7x:2x2x1"},
}


def tpu_mesh(generation: str, shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the first devices of a TPU slice, for `jit(...).lower(...).compile()`."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    os.environ.update(  # keeps libtpu from looking for a TPU, and from locking out other tests
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    topology = topologies.get_topology_desc(platform="tpu", **TPUS[generation])
    size = int(np.prod(list(shape.values())))
    devices = np.array(topology.devices[:size]).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(axis_type,) * len(shape))


def gpu_mesh(shape: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of H100s, for `jit(...).lower(...).compile()`."""
    if missing := gpu_compiler_missing():
        pytest.skip(f"cannot compile for GPUs: {missing}")
    devices = np.array(h100s(math.prod(shape.values()))).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(axis_type,) * len(shape))
