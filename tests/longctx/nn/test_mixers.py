"""The mixers against their formulas; packing, caches and windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longctx.nn import LightningAttention, RingAttention, RopeScaling, SelfAttention
from longctx.nn.cache import Cache
from longctx.nn.position import default_positions, rope_frequencies
from longctx.parallel import make_mesh
from tests.harness import assert_close

B, T, M, H, D = 2, 11, 12, 3, 4
X = jax.random.normal(jax.random.key(0), (B, T, M))
LOG_DECAY = -jnp.array([0.1, 0.5, 0.0])


def lightning(**options):
    options = {"log_decay": LOG_DECAY, "std": 0.5, **options}
    return LightningAttention(M, H, D, rngs=nnx.Rngs(0), **options)


def softmax(**options):
    return SelfAttention(M, 4, D, num_kv_heads=2, std=0.5, rngs=nnx.Rngs(0), **options)


MIXERS = {
    "lightning": lightning,
    "lrpe": lambda: lightning(lrpe=True),
    "softmax": lambda: softmax(qk_norm=True),
    "window": lambda: softmax(window=3),
}


def test_lightning_is_its_formula_with_the_norm_over_the_whole_width():
    module = lightning(lrpe=True)
    q, k, v, u = jnp.moveaxis(jnp.einsum("btm,mpi->btpi", X, module.project.kernel[...]), 2, 0)
    q, k, v = (x.reshape(B, T, H, D) for x in (jax.nn.silu(q), jax.nn.silu(k), v))
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    decay = jnp.where(distance >= 0, jnp.exp(jnp.multiply.outer(LOG_DECAY, distance)), 0)
    turn = jnp.cos(jnp.einsum("hd,ts->htsd", module.lrpe.theta[...], distance * 1.0))
    o = jnp.einsum("bthd,bshd,htsd,hts,bshe->bthe", q, k, turn, decay, v).reshape(B, T, H * D)
    o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6)
    assert_close(module(X)[0], (o * u) @ module.output.kernel[...], 1e-5)


def test_lrpe_angles_start_as_the_authors_code_has_them():
    theta = lightning(lrpe=True).lrpe.theta[...].reshape(-1)
    np.testing.assert_allclose(theta, 10000.0 ** (-2 * np.arange(H * D) / (H * D)), rtol=1e-6)


def test_attention_is_its_formula():
    module = softmax(rope_base=None, window=4)
    q = jnp.einsum("btm,mi->bti", X, module.query.kernel[...][:, 0]).reshape(B, T, 2, 2, D)
    k, v = jnp.moveaxis(jnp.einsum("btm,mpi->btpi", X, module.key_value.kernel[...]), 2, 0)
    k, v = k.reshape(B, T, 2, D), v.reshape(B, T, 2, D)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen = (distance >= 0) & (distance < 4)
    scores = jnp.where(seen, jnp.einsum("btkgd,bskd->bkgts", q, k) / 2, -jnp.inf)
    o = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v).reshape(B, T, 16)
    assert_close(module(X)[0], o @ module.output.kernel[...], 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_equal_separate_ones(name):
    module = MIXERS[name]()
    call = jax.jit(lambda x, doc_start: module(x, doc_start=doc_start)[0])
    doc_start = jnp.where(jnp.arange(T) >= 4, 4, 0)[None].repeat(B, 0)
    packed = call(X, doc_start)
    assert_close(packed[:, :4], call(X[:, :4], None), 1e-5)
    assert_close(packed[:, 4:], call(X[:, 4:], None), 1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_cached_calls_equal_one_pass(name):
    """Ragged prefill, one of it empty for a row, then single tokens."""
    module = MIXERS[name]()
    full, _ = module(X)
    call = jax.jit(lambda x, cache, lengths: module(x, cache, lengths=lengths))
    cache, seen = module.init_cache(B, T), np.zeros(B, int)
    for lengths in ([5, 2], [0, 3], None, None):
        size = 1 if lengths is None else 5
        new = np.ones(B, int) if lengths is None else np.array(lengths)
        slots = np.minimum(seen[:, None] + np.arange(size), T - 1)
        y, cache = call(X[np.arange(B)[:, None], slots], cache, None if lengths is None else new)
        for b in range(B):
            assert_close(y[b, : new[b]], full[b, seen[b] : seen[b] + new[b]], 1e-5)
        seen = seen + new
        np.testing.assert_array_equal(cache.length, seen)


def test_a_cache_without_ragged_lengths_continues():
    for make in MIXERS.values():
        module = make()
        full, _ = module(X)
        first, cache = module(X[:, :6], module.init_cache(B, T))
        second, _ = module(X[:, 6:], cache)
        assert_close(jnp.concatenate([first, second], axis=1), full, 1e-5)


def test_norm_of_queries_and_keys_ignores_their_scale():
    module = softmax(qk_norm=True, norm_eps=0.0)
    before, _ = module(X)
    module.query.kernel[...] = 7 * module.query.kernel[...]
    assert_close(module(X)[0], before, 1e-5)


def test_rope_scaling_stretches_wavelengths():
    plain = rope_frequencies(8, 10000.0)
    assert_close(rope_frequencies(8, 10000.0, RopeScaling("linear", 4.0)), plain / 4, 1e-6)
    ntk = rope_frequencies(8, 10000.0, RopeScaling("ntk", 4.0))
    assert_close(ntk[jnp.array([0, 3])], plain[jnp.array([0, 3])] / jnp.array([1, 4]), 1e-6)
    llama = rope_frequencies(8, 10000.0, RopeScaling("llama3", 8.0, original_length=64))
    assert_close(llama[0], plain[0], 1e-6)
    assert_close(llama[-1], plain[-1] / 8, 1e-6)
    assert plain[1] / 8 < llama[1] < plain[1]


def test_half_of_the_features_are_rotated():
    whole, half = softmax(), softmax(rope_fraction=0.5)
    assert jnp.max(jnp.abs(whole(X)[0] - half(X)[0])) > 1e-3
    with pytest.raises(ValueError, match="rope_fraction"):
        softmax(rope_fraction=0.25)


def test_ring_attention_names_the_strategy():
    assert RingAttention(M, 4, D, rngs=nnx.Rngs(0)).strategy == "ring"


def continued_in_shards():
    module = softmax()
    slots = Cache(P(), (P(None, "seq"),) * 2)
    mesh = make_mesh(seq=2)
    continue_ = jax.shard_map(
        lambda x, cache: module(x, cache)[0], mesh=mesh, in_specs=(P(), slots), out_specs=P()
    )
    return jax.eval_shape(continue_, X, module.init_cache(B, 2 * T))


def test_a_module_made_before_the_mesh_is_called_under_it():
    module = softmax()
    want = module(X)[0]
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert_close(module(X)[0], want, 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lightning(log_decay=jnp.zeros(2)), "log_decay"),
        (lambda: lightning(gate="open"), "gate"),
        (lambda: lightning(activation="tanh"), "activation"),
        (lambda: lightning(norm="batch"), "norm"),
        (lambda: SelfAttention(M, 4, D, num_kv_heads=3, rngs=nnx.Rngs(0)), "num_kv_heads"),
        (lambda: lightning()(X, lengths=jnp.array([1, 2])), "lengths"),
        (
            lambda: lightning()(
                X, lightning().init_cache(B, 0), doc_start=jnp.zeros((B, T), jnp.int32)
            ),
            "doc_start",
        ),
        (
            lambda: softmax()(X, doc_start=jnp.zeros((B, 1), jnp.int32)),
            r"doc_start must be integer \[B, T\]",
        ),
        (
            lambda: softmax()(X, softmax().init_cache(B, T), lengths=jnp.ones(1, jnp.int32)),
            r"lengths must be \[B\]",
        ),
        (
            lambda: softmax()(X, softmax().init_cache(B, T - 1)),
            f"{T} tokens do not fit into a cache of {T - 1}",
        ),
        (lambda: continued_in_shards(), "a cache cannot be continued inside a shard_map"),
        (lambda: RopeScaling("yarn"), "yarn"),
        (lambda: RopeScaling("linear", 0.5), "factor"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_are_not_guessed_where_they_do_not_follow_from_the_slots():
    options = {"doc_start": None, "cache": None, "axis": "seq"}
    with jax.set_mesh(make_mesh(seq=2)):
        assert default_positions(4, layout="contiguous", **options).shape == (1, 4)
        with pytest.raises(ValueError, match="positions"):
            default_positions(4, layout="zigzag", **options)
