"""The modules of 2306.01160: decoding equals the full pass, draws are explicit, seq is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.nn.draw import Draw, redraw
from longctx.nn.sparse import DropAttention, HashAttention, TiedAttention
from longctx.parallel.mesh import make_mesh
from tests.harness import assert_close

WIDTH, HEADS, HEAD_DIM, LENGTH = 16, 2, 8, 80

MODULES = {
    "tied": TiedAttention,
    "tied, all channels": functools.partial(TiedAttention, key_norm="all"),
    "hash": functools.partial(HashAttention, num_buckets=4),
    "drop": functools.partial(DropAttention, drop=0.4),
}


def make(name, seed=0):
    return MODULES[name](WIDTH, HEADS, HEAD_DIM, std=0.5, rngs=nnx.Rngs(seed))


def tokens(length=LENGTH, batch=2):
    return jax.random.normal(jax.random.key(5), (batch, length, WIDTH))


@nnx.jit
def run(module, x, *args, **kwargs):
    return module(x, *args, **kwargs)


@pytest.mark.parametrize("name", ["tied", "hash", "drop"])
def test_prefill_and_decode_equal_the_full_pass(name):
    module, x = make(name), tokens()
    full, nothing = run(module, x)
    assert nothing is None
    lengths = jnp.asarray([70, 66])  # beyond one block of rows, and unequal
    y, cache = run(module, x[:, :72], module.init_cache(2, LENGTH), lengths=lengths)
    for b, n in enumerate(lengths):
        assert_close(y[b, :n], full[b, :n], 1e-5)
    for _ in range(3):
        new = jnp.take_along_axis(x, cache.length[:, None, None], 1)
        want = jnp.take_along_axis(full, cache.length[:, None, None], 1)
        y, cache = run(module, new, cache)
        assert_close(y, want, 1e-5)


@pytest.mark.parametrize("name", ["hash", "drop"])
def test_what_comes_later_changes_nothing_and_redraw_does(name):
    module = make(name)
    first, _ = run(module, tokens())
    changed, _ = run(module, tokens().at[:, 37:].multiply(-1.0))
    assert_close(changed[:, :37], first[:, :37], 1e-5)
    assert np.abs(changed - first)[:, 37:].max() > 1e-3
    longer, _ = run(module, jnp.concatenate([tokens(), tokens(30)], 1))
    assert_close(longer[:, :LENGTH], first, 1e-5)
    nnx.update(module, redraw(nnx.state(module, Draw)))
    other, _ = run(module, tokens())
    assert np.abs(other - first).max() > 1e-3


@pytest.mark.parametrize("name", ["hash", pytest.param("drop", marks=pytest.mark.slow)])
def test_gradients_reach_every_parameter_and_survive_rematerialisation(name):
    module = make(name)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params, rest)(x)[0] ** 2)

    plain = jax.jit(jax.grad(loss))(params, tokens())
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(params, tokens())
    assert_close(again, plain, 1e-5)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(plain))


def test_keys_are_normalised_queries():
    q = jax.random.normal(jax.random.key(0), (2, 5, HEADS, HEAD_DIM))
    per_head, overall = (make(name)._keys(q) for name in ("tied", "tied, all channels"))
    np.testing.assert_allclose(jnp.linalg.norm(per_head, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(overall, axis=(-2, -1)), 1.0, rtol=1e-5)


def test_kept_rows_beyond_the_capacity_are_reported():
    module = make("drop")
    assert not module.overflow(2, LENGTH).any()
    kept = np.stack([np.asarray(x).sum(1) for x in module._keep(2, LENGTH, jnp.zeros(2, int))])
    module.capacity = lambda length: 40
    np.testing.assert_array_equal(module.overflow(2, LENGTH), np.maximum(kept - 40, 0))
    assert kept.max() > 40


def test_one_mesh_equals_one_device_and_a_split_sequence_is_refused():
    module, x = make("hash"), tokens(batch=4)
    want, _ = run(module, x)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        got, _ = run(module, x)
    assert_close(got, want, 1e-5)
    with jax.set_mesh(make_mesh(seq=2)), pytest.raises(NotImplementedError, match="seq"):
        module(x)


@pytest.mark.parametrize(
    "kind, options",
    [
        (HashAttention, {"num_buckets": 4}),
        pytest.param(DropAttention, {"drop": 0.4}, marks=pytest.mark.slow),
    ],
)
def test_in_linen(kind, options):
    module = nnx.bridge.to_linen(kind, WIDTH, HEADS, HEAD_DIM, **options)
    variables = module.init(jax.random.key(1), tokens())
    full, _ = jax.jit(module.apply)(variables, tokens())
    cache = module.apply(variables, 2, LENGTH, nnx_method="init_cache")
    y, _ = jax.jit(module.apply)(variables, tokens(), cache)
    assert_close(y, full, 1e-5)


def test_refuses():
    with pytest.raises(ValueError, match="drop"):
        DropAttention(WIDTH, HEADS, HEAD_DIM, drop=1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="key_norm"):
        TiedAttention(WIDTH, HEADS, HEAD_DIM, key_norm="none", rngs=nnx.Rngs(0))
