"""Weights gathered for all layers at once: who has which part, and how gradients come home."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.models import ParallelConfig, build
from longctx.nn import weights
from longctx.nn.linear import Linear
from longctx.nn.sharding import DEFAULT_AXES
from longctx.nn.stack import gather_layers
from longctx.nn.weights import copies, cut_of
from longctx.parallel import make_mesh
from tests.longctx.models.tiny import CONFIGS

KEPT, USED = P(("fsdp", "seq"), None), P(None, None)


@pytest.fixture(params=[True, False], ids=["copied", "reduce-scatter"])
def copied(request, monkeypatch):
    """Whether devices send parts of gradients straight to their owners."""
    monkeypatch.setattr(weights, "copies_between_memories", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("shape", "kept", "cut"),
    [
        ((16, 3), KEPT, (8, 0)),
        ((3, 16), P(None, ("fsdp", "seq")), (8, 1)),
        ((3, 16), P("tensor", "seq"), (4, 1)),
        ((6, 3), KEPT, None),  # whole on the devices along seq, which do not divide it
        ((16, 3), P("fsdp", None), None),
    ],
)
def test_weights_are_cut_where_their_spec_says(shape, kept, cut):
    with jax.set_mesh(make_mesh(fsdp=2, seq=4)):
        found = cut_of(shape, kept, USED, "seq")
    assert (found and (found.parts, found.dim)) == cut


def test_weights_are_not_cut_without_a_sequence_axis_that_xla_places():
    def inside(x):
        assert cut_of((16, 3), KEPT, USED, "seq") is None
        return x

    assert cut_of((16, 3), KEPT, USED, "seq") is None
    with jax.set_mesh(make_mesh(fsdp=2)):
        assert cut_of((16, 3), KEPT, USED, "seq") is None
    with jax.set_mesh(make_mesh(seq=4, axis_type=jax.sharding.AxisType.Explicit)):
        assert cut_of((16, 3), KEPT, USED, "seq") is None
    with jax.set_mesh(make_mesh(seq=4)):
        assert cut_of((16, 3), KEPT, USED, None) is None
        jax.eval_shape(jax.shard_map(inside, in_specs=P("seq"), out_specs=P("seq")), jnp.ones(4))


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_gradients_are_summed_by_their_owners(copied, dim):
    kept = P(*(("fsdp", "seq") if i == dim else None for i in range(2)))
    kernel = jax.random.normal(jax.random.key(0), (2, 16, 24))  # of two layers
    factors = jax.random.normal(jax.random.key(1), (4, 16, 24))  # of four devices

    def loss(kernel, factors):
        cut = cut_of(kernel.shape[1:], kept, USED, "seq")
        gathered = jax.lax.stop_gradient(cut.gather(kernel))
        return jnp.sum(factors * copies(cut, kernel[1], gathered[:, 1]))

    wanted = jnp.sum(factors, axis=0)
    mesh = make_mesh(fsdp=2, seq=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(kernel, NamedSharding(mesh, P(None, *kept)))
        split = jax.device_put(factors, NamedSharding(mesh, P("seq")))
        step = jax.jit(jax.value_and_grad(loss)).lower(placed, split).compile()
        value, gradient = step(placed, split)
    np.testing.assert_allclose(value, jnp.sum(factors * kernel[1][None]), rtol=1e-5)
    np.testing.assert_allclose(gradient[1], wanted, rtol=1e-5)
    assert not np.any(gradient[0])
    assert gradient.sharding.spec == P(None, *kept)
    assert ("collective-permute" in step.as_text()) == copied


def test_owners_add_gradients_in_float32():
    # In bfloat16 256 + 1 is 256, whatever the number of ones.
    factors = jnp.array([1, 1, 256, 1, 1, 1, 1, 1], jnp.bfloat16)

    def loss(kernel, factors):
        cut = cut_of(kernel.shape, P("seq"), P(None), "seq")
        copy = copies(cut, kernel, kernel.reshape(8, 1))
        return jnp.sum(factors[:, None] * copy, dtype=jnp.float32)

    with jax.set_mesh(make_mesh(seq=8)):
        gradient = jax.jit(jax.grad(loss))(jnp.ones(8, jnp.bfloat16), factors)
    np.testing.assert_array_equal(gradient, jnp.full(8, 264, jnp.bfloat16))  # 263, rounded


def test_layers_are_copied_and_hold_weights_in_the_compute_dtype():
    axes = DEFAULT_AXES.with_parameters_over_seq()

    class Layers(nnx.Module):
        def __init__(self):
            options = {"spec": (None, axes.fsdp), "axes": axes, "dtype": jnp.bfloat16}
            one = Linear(8, 12, **options, rngs=nnx.Rngs(0))
            one.kernel.set_value(jnp.stack([one.kernel[...], -one.kernel[...]]))
            self.projection = one

    layers = Layers()
    with jax.set_mesh(make_mesh(seq=2)):
        found = jax.jit(lambda: gather_layers(layers).projection.gathered)()
    assert layers.projection.gathered is None
    kernel = np.asarray(layers.projection.kernel[...].astype(jnp.bfloat16))
    np.testing.assert_array_equal(found, np.stack([kernel[..., :6], kernel[..., 6:]]))


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_a_step_gathers_all_layers_at_once_and_its_loops_send_parts_of_gradients(remat):
    changes = {"num_layers": 5, "remat": remat, "width": 64, "vocab_size": 48}
    config = dataclasses.replace(CONFIGS["tnl"], **changes)
    parallel = ParallelConfig(fsdp_over_seq=True, gather="step")
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), parallel=parallel)), nnx.Param, ...
    )

    def loss(params, rest, tokens):
        return jnp.sum(nnx.merge(graph, params, rest)(tokens))

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    mesh = make_mesh(seq=4)
    with jax.set_mesh(mesh):
        state = params, rest
        state = jax.tree.map(placed, state, nnx.get_named_sharding(state, mesh))
        tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
        tokens = placed(tokens, NamedSharding(mesh, P(None, "seq")))
        program = jax.jit(jax.grad(loss)).lower(*state, tokens).compile().as_text()
    before, entry = program.split("ENTRY")

    def shapes(kind, text):
        return set(re.findall(rf"= f32\[([\d,]+)\]\S* {kind}\(", text))

    # Four of the five layers are a loop: [4 layers, 4 parts, ...], or the width last.
    assert {"4,4,16,4,16", "4,16,4,16", "4,4,16,2,24", "4,24,4,16"} <= shapes("all-gather", entry)
    assert shapes("all-gather", before) == {"4,1,2,8,8"}  # states of two heads
    assert {math.prod(map(int, s.split(","))) for s in shapes("collective-permute", before)} == {
        64 * features // 4 for features in (4 * 16, 16, 2 * 24, 24)
    }
    assert not shapes("all-reduce", before)
