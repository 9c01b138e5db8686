"""Ahead-of-time compilation for devices that are not there.

libtpu describes TPUs and compiles for them; the CUDA plugin compiles for the H100 described here,
with ptxas from the machine's CUDA toolkit.
"""

import importlib.util
import os
import shutil

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

# Name and layout of the smallest slice, by generation.
TPUS = {
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
    "tpu7x": {"topology_name": "tpu7x:2x2x1"},
}


def tpu_mesh(generation: str, shape: dict[str, int]) -> Mesh:
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
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 fpus_per_core: 128
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def gpu_mesh(shape: dict[str, int]) -> Mesh:
    """A mesh of H100s, for `jit(...).lower(...).compile()`."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None:
        pytest.skip("the CUDA plugin of jax or ptxas, which compile for GPUs, is not installed")
    size = int(np.prod(list(shape.values())))
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{size}", target_config=H100
    )
    devices = np.array(topology.devices).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
