"""Modules on Explicit axes, as `jax.make_mesh` makes them: the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from longctx.nn import (
    GLU,
    Cache,
    DropAttention,
    HashAttention,
    LightningAttention,
    SelfAttention,
    TensorizedAttention,
    TiedAttention,
)
from longctx.parallel.mesh import AXES, BATCH
from tests.harness import assert_close

B, T, M = 4, 16, 16
X = jax.random.normal(jax.random.key(0), (B, T, M))
HEADS = {"num_heads": 2, "head_dim": 8}

MODULES = {
    "lightning": functools.partial(LightningAttention, M, **HEADS, lrpe=True),
    "softmax": functools.partial(SelfAttention, M, **HEADS, qk_norm=True),
    "hash": functools.partial(HashAttention, M, **HEADS, num_buckets=4),
    "drop": functools.partial(DropAttention, M, **HEADS, drop=0.25),
    "tied": functools.partial(TiedAttention, M, **HEADS),
    "tensorized": functools.partial(TensorizedAttention, M, **HEADS, dims=(4, None)),
}
WHOLE_SEQUENCES = ("hash", "drop", "tied")


def explicit(data=1, fsdp=1, seq=1, tensor=1):
    """The mesh as JAX makes it where nothing else is asked for."""
    mesh = jax.make_mesh((data, fsdp, seq, tensor), AXES)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    return mesh


def on(mesh, module):
    """The module's parts, its parameters where their metadata puts them."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, jax.device_put(params, nnx.get_named_sharding(params, mesh)), rest


@pytest.mark.parametrize("name", MODULES)
def test_gradients_equal_one_devices(name):
    def loss(graph, params, rest, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(x)[0]))

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 3)), static_argnums=0)
    graph, params, rest = nnx.split(MODULES[name](rngs=nnx.Rngs(0)), nnx.Param, ...)
    want = run(graph, params, rest, X)
    along = "fsdp" if name in WHOLE_SEQUENCES else "seq"
    mesh = explicit(data=2, tensor=2, **{along: 2})
    with jax.set_mesh(mesh):
        graph, params, rest = on(mesh, MODULES[name](rngs=nnx.Rngs(0)))
        x = jax.device_put(X, jax.NamedSharding(mesh, P(BATCH, "seq")))
        got = run(graph, params, rest, x)
        assert jax.typeof(got[1][1]) == jax.typeof(x)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_cached_calls_equal_one_devices(name):
    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, params, rest, x):
        module = nnx.merge(graph, params, rest)
        first, cache = module(x[:, : T - 1], module.init_cache(B, T))
        last, _ = module(x[:, T - 1 :], cache)
        return first, last

    graph, params, rest = nnx.split(MODULES[name](rngs=nnx.Rngs(0)), nnx.Param, ...)
    want = run(graph, params, rest, X)
    mesh = explicit(data=2, tensor=2)
    with jax.set_mesh(mesh):
        graph, params, rest = on(mesh, MODULES[name](rngs=nnx.Rngs(0)))
        got = run(graph, params, rest, jax.device_put(X, jax.NamedSharding(mesh, P("data"))))
    assert_close(got, want, 1e-5)


def test_a_cache_stays_split_as_it_was_placed():
    mesh = explicit(data=2, tensor=2)
    with jax.set_mesh(mesh):
        module = MODULES["softmax"](rngs=nnx.Rngs(0))
        place = functools.partial(
            jax.device_put, device=jax.NamedSharding(mesh, P("data", None, "tensor"))
        )
        empty = module.init_cache(B, T)
        cache = Cache(empty.length, jax.tree.map(place, empty.memory))
        x = jax.device_put(X, jax.NamedSharding(mesh, P("data")))
        _, new = jax.jit(lambda x, cache: module(x, cache))(x, cache)
    assert jax.tree.map(jax.typeof, new.memory) == jax.tree.map(jax.typeof, cache.memory)


def test_channels():
    def loss(graph, params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    graph, params = nnx.split(GLU(M, 24, rngs=nnx.Rngs(0)))
    want = run(graph, params, X)
    mesh = explicit(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, nnx.get_named_sharding(params, mesh))
        got = run(graph, params, jax.device_put(X, jax.NamedSharding(mesh, P("fsdp"))))
    assert_close(got, want, 1e-5)
