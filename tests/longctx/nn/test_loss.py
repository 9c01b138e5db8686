"""The chunked loss against the plain one, and the memory it needs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.nn import chunked_cross_entropy
from longctx.parallel import make_mesh
from tests.harness import assert_close, check_op, pullback_of, random_like


def plain(hidden, head, targets):
    logits = jnp.einsum("btm,vm->btv", hidden, head)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def inputs(batch, length, width, vocab, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, width)).astype(dtype)
    head = jax.random.normal(keys[1], (vocab, width)).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (batch, length), 0, vocab)


@pytest.mark.parametrize("chunk", [1, 7, 22, 4096])
def test_equals_plain_loss(chunk):
    def chunked(*args):
        return chunked_cross_entropy(*args, chunk=chunk)

    check_op(chunked, plain, inputs(2, 11, 16, 33), wrt=(0, 1), tolerance=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 4}, {"data": 2, "seq": 2, "tensor": 2}])
def test_vocabulary_over_devices(sizes):
    """Thirty-three tokens do not divide: the last device's part is filled up."""
    args = inputs(2, 12, 16, 33)
    cotangent = random_like(args[2].astype(jnp.float32), jax.random.key(1))
    chunked = pullback_of(functools.partial(chunked_cross_entropy, chunk=7), wrt=(0, 1))
    want = pullback_of(plain, wrt=(0, 1))(args, cotangent)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        head = jax.device_put(args[1], NamedSharding(mesh, P(None, "fsdp")))
        placed = (args[0], head, args[2])
        compiled = chunked.lower(placed, cotangent).compile()
        got = compiled(placed, cotangent)
    assert_close(got, want, 1e-6)
    logits = {int(n) for n in re.findall(r"f32\[[67],(\d+)\]", compiled.as_text())}
    assert math.ceil(33 / sizes["tensor"]) in logits and 33 not in logits, logits


def test_bfloat16_inputs_keep_float32_logits():
    def chunked(*args):
        return chunked_cross_entropy(*args, chunk=16)

    args = inputs(2, 50, 64, 100, jnp.bfloat16)
    assert chunked(*args).dtype == jnp.float32
    check_op(chunked, plain, args, wrt=(0, 1), tolerance=1e-4, grad_tolerance=5e-3)


def temporary_bytes(length, chunk):
    def loss(hidden, head, targets):
        return chunked_cross_entropy(hidden, head, targets, chunk=chunk).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    shapes = jax.eval_shape(lambda: inputs(1, length, 8, 5000))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_holds_a_chunk_of_logits_and_no_more():
    chunk = 64
    logits = chunk * 5000 * 4
    short, long = temporary_bytes(1024, chunk), temporary_bytes(8192, chunk)
    assert long < 6 * logits < 8192 * 5000 * 4 / 10
    assert long - short < logits


def test_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_cross_entropy(*inputs(1, 4, 4, 4), chunk=0)
