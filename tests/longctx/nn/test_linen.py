"""The mixers inside a Linen model, through `flax.nnx.bridge`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longctx.nn import LightningAttention, RingAttention, RMSNorm, SelfAttention, SRMSNorm
from longctx.parallel import Layout, make_mesh
from tests.harness import assert_close

B, T, M = 2, 8, 16
X = jax.random.normal(jax.random.key(0), (B, T, M))


def mixer(kind):
    """A mixer as a Linen module."""
    if kind == "lightning":
        options = {"log_decay": -jnp.array([0.1, 0.4]), "lrpe": True}
        return nnx.bridge.to_linen(LightningAttention, M, 2, 8, **options)
    return nnx.bridge.to_linen(SelfAttention, M, 2, 8)


class Residual(nn.Module):
    """What a user of Linen writes around a mixer."""

    kind: str

    @nn.compact
    def __call__(self, x, _=None):
        return x + mixer(self.kind)(nn.LayerNorm()(x))[0], None


KINDS = pytest.mark.parametrize("kind", ["lightning", "softmax"])


@KINDS
def test_init_value_and_gradient(kind):
    module = mixer(kind)
    variables = module.init(jax.random.key(1), X)

    def total(params):
        return jnp.sum(module.apply({**variables, "params": params}, X)[0] ** 2)

    value, grads = jax.jit(jax.value_and_grad(total))(variables["params"])
    assert value > 0
    assert all(jnp.max(jnp.abs(g)) > 0 for g in jax.tree.leaves(grads))


def test_norms_are_wrapped_alike():
    norms = nnx.bridge.to_linen(SRMSNorm), nnx.bridge.to_linen(RMSNorm, M)
    simple, weighted = (norm.init_with_output(jax.random.key(1), X)[0] for norm in norms)
    want = X / jnp.sqrt(jnp.mean(X**2, axis=-1, keepdims=True))
    assert_close((simple, weighted), (want, want), 1e-6)


@KINDS
def test_scan_and_remat(kind):
    layers = 3

    def stacked(layer):
        axes = {"params": 0, "Constant": 0}
        names = {nn.PARTITION_NAME: None}
        return nn.scan(
            layer,
            variable_axes=axes,
            split_rngs={"params": True},
            length=layers,
            metadata_params=names,
        )(kind)

    plain, saving = stacked(Residual), stacked(nn.remat(Residual, prevent_cse=False))
    variables = plain.init(jax.random.key(1), X, None)
    assert all(x.shape[0] == layers for x in jax.tree.leaves(variables))
    specs = jax.tree.leaves(nn.get_partition_spec(variables), is_leaf=lambda x: isinstance(x, P))
    assert P(None, "tensor", "fsdp") in specs

    def gradient(module):
        def total(params):
            return jnp.sum(module.apply({**variables, "params": params}, X, None)[0] ** 2)

        return jax.jit(jax.value_and_grad(total))(variables["params"])

    assert_close(gradient(saving), gradient(plain), 1e-5)


@KINDS
def test_decode_cache(kind):
    module = mixer(kind)
    variables = module.init(jax.random.key(1), X)
    full, _ = module.apply(variables, X)
    cache = module.apply(variables, B, T, nnx_method="init_cache")
    step = jax.jit(lambda x, cache: module.apply(variables, x, cache))
    for t in range(T):
        y, cache = step(X[:, t : t + 1], cache)
        assert_close(y[:, 0], full[:, t], 1e-5)
    np.testing.assert_array_equal(cache.length, [T, T])


@KINDS
def test_on_a_mesh(kind):
    """A Linen model whose sequences lie on four devices, heads on two: values and gradients."""
    layout = Layout("zigzag", 4)
    options = {"layout": layout, "strategy": "ring"}
    if kind == "lightning":
        options |= {"log_decay": -jnp.array([0.1, 0.4])}
    module, alone = (
        nnx.bridge.to_linen(
            LightningAttention if kind == "lightning" else RingAttention, M, 2, 8, **o
        )
        for o in (options, {k: v for k, v in options.items() if k == "log_decay"})
    )
    positions = jnp.arange(T)[None]
    variables = alone.init(jax.random.key(1), X)

    def gradient(module, x, positions):
        def total(variables):
            return jnp.sum(jnp.sin(module.apply(variables, x, positions=positions)[0]))

        return jax.jit(jax.value_and_grad(total, allow_int=True))(variables)

    want = gradient(alone, X, positions)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
        got = gradient(module, layout.apply(X), layout.apply(positions))
    assert_close(got, want, 1e-5)


@KINDS
def test_sharding_metadata(kind):
    module = mixer(kind)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(1), X))
    specs = nn.get_partition_spec(variables)["params"]
    assert tuple(specs["output"]["kernel"]) == ("tensor", "fsdp")
    first = "project" if kind == "lightning" else "query"
    assert tuple(specs[first]["kernel"]) == ("fsdp", None, "tensor")
