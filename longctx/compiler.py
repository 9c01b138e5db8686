"""What XLA is told about a program, by the kind of device that it is compiled for."""

from typing import Any

import jax

# By default a TPU stops computing while weights are gathered and gradients scattered. A v5p has a
# second kind of core that can move them meanwhile; a v5e weaves the moves into its products.
SPARSE_CORES_MOVE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}
PRODUCTS_MOVE = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
TRAINING = {"TPU v5": SPARSE_CORES_MOVE, "TPU v5 lite": PRODUCTS_MOVE}
# By default XLA copies a GPU's gradients of a layer into one buffer, to sum them together once the
# last is known, and lets one collective start only after the one before has ended. Apart, each sum
# starts with its own gradient, and moves of a ring need not wait for one another.
TRAINING_ON_GPU = {
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**20),
    "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
}
# Between the GPUs of one process XLA can also move arrays from memory to memory, not through NCCL:
# rings of four H100s took 2 to 12% less time, of two about as long (rows ring_peer_ideal beside
# ring_ideal in experiments/bench/results, 2026-11-26). It has such an option for all-gathers, too,
# but ran NCCL's kernels all the same (rows ring_trace, of a commit that set it).
GPUS_OF_ONE_PROCESS = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
# The layers of a model are slices of one array. By default XLA copies a layer's weights before it
# multiplies a few tokens by them, three times the traffic; its own kernels know no other way.
DECODING_ON_GPU = {
    "xla_gpu_enable_dynamic_slice_fusion": True,
    "xla_gpu_enable_triton_gemm": False,
}


def training_options() -> dict[str, Any]:
    """For a training step on the devices of the mesh in use, as `jax.jit` takes them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return {}
    if device.platform != "gpu":
        return TRAINING.get(device.device_kind, {})
    return TRAINING_ON_GPU | (GPUS_OF_ONE_PROCESS if copies_between_memories() else {})


def copies_between_memories() -> bool:
    """Whether collective permutes between the devices of the mesh in use are mere copies."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform != "tpu" and jax.process_count() == 1


def decoding_options(platform: str) -> dict[str, Any]:
    """For steps of one token a row on "gpu", "tpu" or "cpu", as `jax.jit` takes them."""
    return DECODING_ON_GPU if platform == "gpu" else {}
