"""TensorizedAttention: prefill and decode equal the full pass; it starts as dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.nn.attention import SelfAttention
from longctx.nn.tensorized import TensorizedAttention
from longctx.parallel.mesh import make_mesh
from tests.harness import assert_close

WIDTH, HEADS, HEAD_DIM, LENGTH = 16, 4, 8, 40


def make(seed=0, **options):
    options = {"dims": (8, 8), "num_kv_heads": 2, "std": 0.5} | options
    return TensorizedAttention(WIDTH, HEADS, HEAD_DIM, rngs=nnx.Rngs(seed), **options)


def tokens(batch=2, length=LENGTH):
    return jax.random.normal(jax.random.key(5), (batch, length, WIDTH))


@nnx.jit
def run(module, x, *args, **kwargs):
    return module(x, *args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dims": (4, 3, None), "positions": "global"}, marks=pytest.mark.slow),
        pytest.param(
            {"dims": (4, 4, 4), "order": "fast_first", "num_kv_heads": None},
            marks=pytest.mark.slow,
        ),
        pytest.param({"dims": (64,), "self_bias": None}, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decode_equal_the_full_pass(options):
    module, x = make(**options), tokens()
    full, nothing = run(module, x)
    assert nothing is None
    lengths = jnp.asarray([17, 9])
    y, cache = run(module, x[:, :17], module.init_cache(2, LENGTH), lengths=lengths)
    for b, n in enumerate(lengths):
        assert_close(y[b, :n], full[b, :n], 1e-5)
    for count in (1, 1, 6, 1):  # one by one, and several at once
        at = cache.length[:, None] + jnp.arange(count)[None]
        new, want = (jnp.take_along_axis(z, at[..., None], 1) for z in (x, full))
        y, cache = run(module, new, cache)
        assert_close(y, want, 1e-5)


def test_in_linen():
    module = nnx.bridge.to_linen(TensorizedAttention, WIDTH, HEADS, HEAD_DIM, dims=(8, 8))
    variables = module.init(jax.random.key(1), tokens())
    full, _ = jax.jit(module.apply)(variables, tokens())
    cache = module.apply(variables, 2, LENGTH, nnx_method="init_cache")
    y, _ = jax.jit(module.apply)(variables, tokens(), cache)
    assert_close(y, full, 1e-5)


@pytest.mark.parametrize("variant", ["hierarchical", "dominance"])
def test_ablation_variants_take_packed_rows(variant):
    """What the training loop always gives, as it gives it."""
    doc_start = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < 9, 0, 9)[None], (2, LENGTH))
    module, x = make(variant=variant), tokens()
    packed, _ = run(module, x, doc_start=doc_start)
    assert_close(packed[:, :9], run(module, x[:, :9])[0], 1e-5)


def test_slow_first_keeps_a_ring_of_the_fast_window():
    *_, rings = make().init_cache(2, LENGTH).memory
    assert [ring.shape for ring in rings] == [(2, 8, HEADS, HEAD_DIM)]


def test_starts_as_dense_attention_on_the_first_window():
    """With the weights of `SelfAttention`: what an adapted model begins with."""
    shape = dict(num_kv_heads=2, std=0.5, rngs=nnx.Rngs(0))
    dense = SelfAttention(WIDTH, HEADS, HEAD_DIM, **shape)
    module = make(dims=(16, 4))
    for name in ("query", "key_value", "output"):
        getattr(module, name).kernel[...] = getattr(dense, name).kernel[...]
    want, _ = run(dense, tokens())
    got, _ = run(module, tokens())
    assert_close(got[:, :16], want[:, :16], 1e-5)
    assert np.abs(got[:, 16:] - want[:, 16:]).max() > 1e-2


@pytest.mark.parametrize(
    "mesh, options",
    [
        pytest.param({"data": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
        ({"data": 2, "seq": 2}, {"positions": "global"}),
        ({"seq": 4}, {"dims": (4, 2, None), "order": "fast_first"}),
    ],
)
def test_devices_equal_one_device(mesh, options):
    """Whole sequences or parts of them, packed documents, values and all gradients."""
    module, x = make(**options), tokens(batch=4, length=64)
    starts = jnp.where(jnp.arange(64) < 23, 0, 23)
    doc_start = jnp.stack([jnp.zeros(64, jnp.int32), starts, starts, starts])

    def loss(module, x, doc_start):
        y, _ = module(x, doc_start=doc_start)
        return jnp.sum(y**2), y

    grad = nnx.jit(nnx.grad(loss, has_aux=True))
    want_grads, want = grad(module, x, doc_start)
    with jax.set_mesh(make_mesh(**mesh)):
        grads, got = grad(module, x, doc_start)
    assert_close(got, want, 1e-5)
    assert_close(grads, want_grads, 1e-5)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))


def test_what_a_split_sequence_cannot_do_is_said():
    x = tokens(length=64)
    with jax.set_mesh(make_mesh(seq=4)):
        module = make()
        with pytest.raises(NotImplementedError, match="cache"):
            module(x, module.init_cache(2, 64))
        with pytest.raises(ValueError, match="fastest dimension"):
            make(dims=(32, None), order="fast_first")(x)
        with pytest.raises(ValueError, match="stride"):
            make(dims=(6, None))(x)
        with pytest.raises(NotImplementedError, match="zigzag"):
            make(layout="zigzag")(x)


def test_refuses():
    with pytest.raises(ValueError, match="kronecker"):
        make(variant="kronecker")
    with pytest.raises(NotImplementedError, match="decoding"):
        make(variant="hierarchical").init_cache(1, 8)
