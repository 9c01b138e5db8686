"""Devices that are not there, to compile for: TPU slices and NVIDIA GPUs by name.

Only the compiler has to be installed: libtpu for TPUs; for GPUs the CUDA plugin of jax, and ptxas.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from longctx.errors import UserError

# Bytes of device memory that programs may use, by the generation in a topology's name: of v5e and
# v5p what the compiler names when it refuses a step, of the others what makers' sheets say (a TPU7x
# chip is two devices).
HBM = {
    "v4": 32e9,
    "v5e": 15.75 * 2**30,
    "v5p": 95.73 * 2**30,
    "v6e": 32e9,
    "tpu7x": 96e9,
    "h100": 80e9,
    "h200": 141e9,
}

# Keeps libtpu from looking for a TPU, and from refusing to run beside another process.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# What XLA asks a GPU about itself: an H100's answers, and the H200's two others.
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
GPUS = {
    "h100": H100,
    "h200": H100.replace("3352320000000", "4800000000000")
    .replace("84978434048", "141000000000")
    .replace("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
}
GPUS_PER_HOST = 8


def gpu_compiler_missing() -> str | None:
    """What is not installed of what compiles for GPUs; None if all is."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin is not installed: pip install jax[cuda13]"
    return None if shutil.which("ptxas") else "ptxas, of the CUDA toolkit, is not on the PATH"


def memory_of(topology: str) -> float | None:
    """Bytes of memory of one device; None where it is not known."""
    generation = re.match(r"(?:\d+x)?(\w+):", topology)
    return HBM.get(generation[1]) if generation else None


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology: "v5p:4x4x4", "2xv5e:16x16" (two slices), "h100:16" (two hosts).

    Raises:
      UserError: the compiler does not know it, or is not installed.
    """
    generation, _, size = topology.partition(":")
    try:
        if generation in GPUS:
            return _gpus(topology, generation, size)
        return _tpus(topology)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        raise UserError(f"topology {topology}: {first}") from error


def _tpus(topology: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("cannot compile for TPUs: libtpu is not installed: pip install libtpu")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    several = re.fullmatch(r"(\d+)x(\w+:.*)", topology)
    slices, name = (int(several[1]), several[2]) if several else (1, topology)
    options = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _gpus(topology: str, generation: str, size: str) -> Sequence[jax.Device]:
    if missing := gpu_compiler_missing():
        raise ValueError(f"cannot compile for GPUs: {missing}")
    count = int(size) if size.isdecimal() else 0
    if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ValueError(
            f"{size!r} must be a number of GPUs, above {GPUS_PER_HOST} a multiple of it"
        )
    hosts, each = -(-count // GPUS_PER_HOST), min(count, GPUS_PER_HOST)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{hosts}x{each}",
        target_config=GPUS[generation],
    )
    return described.devices
