"""Devices that are not there, to compile for: slices of TPUs, and H100s on one host."""

import importlib.util
import shutil
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from longctx.errors import UserError
from longctx.plan import topology_devices

# Names of slices by number of devices.
TPUS = {
    "v5e": {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v5p": {4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4"},
    "v6e": {4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"},
}

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


def gpu_compiler_missing() -> str | None:
    """What is not installed of what compiles for GPUs; None if all is."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA plugin of jax is not installed"
    return "ptxas is not on the path" if shutil.which("ptxas") is None else None


def h100s(count: int) -> Sequence[jax.Device]:
    """So many H100s.

    Raises:
      UserError: what compiles for them is not installed.
    """
    if missing := gpu_compiler_missing():
        raise UserError(f"cannot compile for H100: {missing}")
    shape = f"1x1x{count}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=shape, target_config=H100
    ).devices


def devices_of(chip: str, count: int) -> Sequence[jax.Device]:
    """`count` devices of the kind "v5e", "v5p", "v6e" or "h100"."""
    return h100s(count) if chip == "h100" else topology_devices(TPUS[chip][count])
