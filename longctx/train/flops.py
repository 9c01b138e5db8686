"""Floating-point operations that a model needs, and what a device could do: the terms of MFU."""

import jax

from longctx.models import ModelConfig

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets, by `device_kind`.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}


def device_peak(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device; None where no such number is published (CPUs)."""
    return PEAK_FLOPS.get(device.device_kind)


def forward_flops(model: ModelConfig, length: int) -> float:
    """Operations per token of one forward pass over rows of `length` tokens.

    A product [m, n] @ [n, k] is 2 m n k. Softmax attention counts only the keys that a query may
    see: (length + 1) / 2 on average if causal, fewer with a window, with even buckets, with
    dropping, and in hops (counted as mixed radix). Linear attention counts its
    recurrence, 4 D E per head, whatever its chunks cost. Embedding look-ups, norms and
    activations count nothing, and neither does what rematerialisation repeats. Packed documents
    count as one.
    """
    per_layer = sum(_mixer_flops(model, kind, length) for kind in model.layer_kinds())
    matrices = 3 if model.mlp.kind == "glu" else 2
    mlp = 2 * matrices * model.width * model.mlp.width * model.num_layers
    return per_layer + mlp + 2 * model.width * model.vocab_size


def step_flops(model: ModelConfig, length: int, tokens: int) -> float:
    """Operations of one training step: the backward pass costs two forward passes."""
    return 3 * forward_flops(model, length) * tokens


def _mixer_flops(model: ModelConfig, kind: str, length: int) -> float:
    if kind.startswith("lightning"):
        linear = model.lightning
        inner = linear.num_heads * linear.head_dim
        key_width = linear.head_dim * (2 if kind.endswith("+lrpe") else 1)
        projections = (4 if linear.gate == "off" else 5) * model.width * inner
        return 2 * projections + 4 * key_width * inner
    soft = model.softmax
    inner = soft.num_heads * soft.head_dim
    tied = kind in ("tied", "hash", "drop")  # q, v and output, no keys
    keys = inner // 2 if tied else soft.num_kv_heads * soft.head_dim
    projections = 2 * model.width * (inner + keys)
    return 2 * projections + 4 * inner * _pairs(model, kind, length)


def _pairs(model: ModelConfig, kind: str, length: int) -> float:
    """Keys that a query sees, on average; of tensorized attention the keys of all hops."""
    whole = (length + 1) / 2
    match kind:
        case "window":
            return _windowed(model.softmax.window, length)
        case "hash":
            return whole / model.sparse.num_buckets
        case "drop":
            return whole * (1 - model.sparse.drop) ** 2
        case "tensorized":
            strides, total = 1, 0.0
            for size in model.tensorized.dims:
                rows = -(-length // strides)
                total += _windowed(size or rows, rows)
                strides *= size or 1
            return total
    return whole


def _windowed(window: int, length: int) -> float:
    """Mean keys of a causal window: the first `window` queries see 1, 2, ..., the others all."""
    seen = min(window, length)
    return seen - seen * (seen - 1) / (2 * length)
