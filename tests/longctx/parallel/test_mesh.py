import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.parallel.mesh import AXES, BATCH, MeshConfig, make_mesh, shard_operator
from longctx.topologies import topology_devices
from tests.harness import assert_close

SPEC = P(BATCH, None, "tensor", None)


def attention(q, k, v, shift):
    """Stands for a kernel: batch and heads are independent, time is not."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    if shift is not None:
        scores += shift[:, None, None, :]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)


def sharded(q, k, v, shift):
    return shard_operator(attention, (SPEC, SPEC, SPEC, P(BATCH)), SPEC)(q, k, v, shift)


def gradients(function, q, k, v, shift):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x, shift))), (0, 1, 2))(q, k, v)


def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (4, 16, 4, 8)) for key in keys[:3])
    return q, k, v, jax.random.normal(keys[3], (4, 16))


def test_make_mesh():
    mesh = make_mesh(MeshConfig(data=2, seq=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "seq": 4, "tensor": 1}
    assert mesh.axis_names == AXES
    assert make_mesh(seq=2).shape == make_mesh(MeshConfig(seq=2)).shape
    with pytest.raises(ValueError, match="needs 16 devices, there are 8"):
        make_mesh(seq=16)
    with pytest.raises(ValueError, match="seq=0"):
        MeshConfig(seq=0)
    with pytest.raises(TypeError, match="not both"):
        make_mesh(MeshConfig(), seq=2)


def test_slices_lie_along_the_outer_axes():
    """Of two slices of four chips: an axis goes over both only if those inside of it fill them."""
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    devices = topology_devices("2xv5e:2x2")

    def slices(**sizes):
        mesh = make_mesh(**sizes, devices=devices)
        return np.vectorize(lambda device: device.slice_index)(mesh.devices)

    for outer, sizes in ((0, {"data": 2, "seq": 4}), (1, {"fsdp": 4, "tensor": 2})):
        found = np.moveaxis(slices(**sizes), outer, 0)
        first, second = np.split(found, 2)
        assert (first == 0).all() and (second == 1).all()
    with pytest.raises(ValueError, match=r"uses \[4, 2\] devices of 2 slices: .* as many of each"):
        slices(seq=6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("with_shift", [True, False])
def test_equals_one_device_and_moves_no_activation(axis_type, with_shift):
    args = operands()
    args = args if with_shift else (*args[:3], None)
    want = jax.jit(lambda *a: (attention(*a), gradients(attention, *a)))(*args)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, axis_type=axis_type)
    with jax.set_mesh(mesh):
        args = jax.device_put(
            args,
            (NamedSharding(mesh, SPEC),) * 3
            + (NamedSharding(mesh, P(BATCH)) if with_shift else None,),
        )
        compiled = jax.jit(lambda *a: (sharded(*a), gradients(sharded, *a))).lower(*args).compile()
        assert_close(compiled(*args), want, 1e-6)
    moves = "all-gather|all-to-all|collective-permute|all-reduce"
    assert not re.findall(moves, compiled.as_text())


def test_without_a_wrapper_the_partitioner_would_be_asked():
    """The HLO check above can fail: a wrongly placed operand is gathered."""
    mesh = make_mesh(data=4, tensor=2)
    args = [jax.device_put(x, NamedSharding(mesh, P(None, "data"))) for x in operands()[:3]]
    with jax.set_mesh(mesh):
        text = jax.jit(lambda *a: sharded(*a, None)).lower(*args).compile().as_text()
    assert re.findall("all-gather|all-to-all", text)


def test_projections_and_replicated_weights():
    """A layer around the operator: the weights' gradients are summed, nothing is gathered."""

    def layer(w, x, operator):
        q, k, v = jnp.einsum("btm,nmhd->nbthd", x, w)
        return jnp.einsum("bthd,mhd->btm", operator(q, k, v, None), w[0])

    def loss(w, x, operator):
        return jnp.sum(jnp.sin(layer(w, x, operator)))

    keys = jax.random.split(jax.random.key(1))
    w, x = 0.3 * jax.random.normal(keys[0], (3, 8, 4, 8)), jax.random.normal(keys[1], (4, 16, 8))
    want = jax.jit(jax.value_and_grad(lambda w, x: loss(w, x, attention), (0, 1)))(w, x)
    mesh = make_mesh(data=4, tensor=2)
    with jax.set_mesh(mesh):
        w = jax.device_put(w, NamedSharding(mesh, P(None, None, "tensor")))
        x = jax.device_put(x, NamedSharding(mesh, P(BATCH)))
        run = jax.jit(jax.value_and_grad(lambda w, x: loss(w, x, sharded), (0, 1)))
        compiled = run.lower(w, x).compile()
        assert_close(compiled(w, x), want, 1e-5)
    assert not re.findall("all-gather|all-to-all", compiled.as_text())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("manual", [{"data"}, set(AXES)])
def test_inside_a_users_own_shard_map(axis_type, manual):
    args = operands()[:3]
    batch, heads = (axis if axis in manual else None for axis in ("data", "tensor"))
    spec = P(batch, None, heads)
    mesh = make_mesh(data=4, tensor=2, axis_type=axis_type)
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            lambda q, k, v: sharded(q, k, v, None),
            in_specs=(spec,) * 3,
            out_specs=spec,
            axis_names=manual,
        )
        placed = jax.device_put(args, NamedSharding(mesh, spec))
        assert_close(jax.jit(run)(*placed), attention(*args, None), 1e-6)


def test_no_mesh_and_foreign_mesh():
    args = operands()
    want = attention(*args)
    assert_close(sharded(*args), want, 0)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), (AxisType.Auto,))):
        assert_close(jax.jit(sharded)(*args), want, 1e-6)
