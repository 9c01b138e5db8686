"""Batch and heads over eight devices: values and gradients of one device, nothing gathered."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.harness import assert_close, pullback_of, random_like
from tests.pallas_kernels.lightning_attention.cases import Case, attend, final_state

pytestmark = [
    pytest.mark.usefixtures("strict_dtypes"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]
TOKENS, STATES, HEADS, ROWS = P("data", None, "tensor"), P("data", "tensor"), P("tensor"), P("data")
SPECS = (TOKENS, TOKENS, TOKENS, HEADS, STATES, ROWS)


@pytest.fixture
def x64():
    """In float64: processors round float32 products of some shapes differently."""
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("what", ["outputs", "state"])
def test_equals_one_device(axis_type, what):
    case = Case(100, batch=4, heads=4, dtype=np.float64)
    q, k, v, *small = case.draw()
    args = (q, k, v, *(x.astype(np.float64) for x in small), case.documents())
    function, specs, out_specs = attend("auto"), SPECS, (TOKENS, STATES)
    if what == "state":
        function, args, specs, out_specs = final_state("auto"), args[1:], SPECS[1:], STATES
    cotangent = random_like(jax.eval_shape(function, *args), jax.random.key(0))
    wrt = range(len(args) - 1)  # all but doc_start
    wanted = pullback_of(function, wrt)(args, cotangent)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=True
    )
    place = functools.partial(jax.tree.map, lambda x, s: jax.device_put(x, NamedSharding(mesh, s)))
    with jax.set_mesh(mesh):
        args, cotangent = place(args, specs), place(cotangent, out_specs)
        compiled = pullback_of(sharded, wrt).lower(args, cotangent).compile()
        got = compiled(args, cotangent)
    assert_close(jax.tree.map(np.asarray, got), wanted, 1e-12)
    text = compiled.as_text()
    for absent in ("all-gather", "all-to-all", "collective-permute"):
        assert absent not in text
    # Only the gradient of the decays, a sum over the batch, crosses devices.
    assert text.count(" all-reduce(") == 1
