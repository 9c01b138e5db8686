"""The kernels under plain `jit` on sharded arrays, compiled ahead of time for TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.parallel.context import context_attention
from longctx.parallel.lasp import context_lightning
from longctx.parallel.mesh import AXES, BATCH
from tests.topologies import gpu_mesh, tpu_mesh

MESHES = {"v5e": functools.partial(tpu_mesh, "v5e"), "H100": gpu_mesh}
KERNELS = {"v5e": "tpu_custom_call", "H100": "mosaic_gpu"}
TOKENS = P(BATCH, "seq", "tensor", None)


def flash(q, k, v, _):
    return context_attention(q, k, v)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("operator", "target", "axis_type"),
    [
        (context_lightning, "v5e", AxisType.Auto),
        (flash, "H100", AxisType.Explicit),
        slow(context_lightning, "v5e", AxisType.Explicit),
        slow(context_lightning, "H100", AxisType.Auto),
        slow(context_lightning, "H100", AxisType.Explicit),
        slow(flash, "v5e", AxisType.Auto),
        slow(flash, "v5e", AxisType.Explicit),
        slow(flash, "H100", AxisType.Auto),
    ],
)
def test_every_device_runs_its_own_batch_and_heads(operator, target, axis_type):
    """Forward and backward move nothing between devices, and compute with the kernels."""
    mesh = MESHES[target](dict(zip(AXES, (2, 1, 1, 2), strict=True)), axis_type)

    def gradients(q, k, v, log_decay, do):
        return jax.vjp(lambda *x: operator(*x, log_decay), q, k, v)[1](do)

    def of(spec, *sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    x = of(TOKENS, 2, 1024, 4, 128)
    log_decay = of(P("tensor"), 4, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(x, x, x, log_decay, x).compile().as_text()
    assert KERNELS[target] in text
    for kind in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert kind not in text, kind
