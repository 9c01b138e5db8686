"""Attention in pieces: merge, a carry from earlier keys, gradients added up over keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import Tiles, block_backward, block_forward, merge
from tests.harness import assert_close, pullback_of, random_like
from tests.pallas_kernels.flash_attention.cases import definition, inputs, random_intervals

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BACKENDS = {
    "xla": {"backend": "xla", "tiles": Tiles(16, 8)},
    "reference": {"backend": "reference"},
}
backends = pytest.mark.parametrize("how", BACKENDS.values(), ids=BACKENDS)
CUT = 20  # keys of the first of two blocks


def pieces(batch=2, length=33, kv_length=50, dtype=jnp.float32):
    """Inputs, intervals over all keys, and (k, v, lo, hi) of the two blocks of keys."""
    q, k, v = inputs(batch, length, kv_length, heads=4, kv_heads=2, dtype=dtype)
    lo, hi = random_intervals((batch, length), kv_length)
    first = (k[:, :CUT], v[:, :CUT], lo, hi)
    second = (k[:, CUT:], v[:, CUT:], lo - CUT, hi - CUT)
    return q, k, v, lo, hi, first, second


@backends
def test_carry_equals_concatenation(how):
    q, k, v, lo, hi, first, second = pieces()
    carry = None
    for k_n, v_n, lo_n, hi_n in (first, second):
        carry = block_forward(q, k_n, v_n, lo=lo_n, hi=hi_n, carry=carry, soft_cap=3.0, **how)
    assert_close(carry, definition(q, k, v, lo, hi, causal=False, soft_cap=3.0), 2e-6)


@backends
def test_accumulated_gradients_equal_those_of_all_keys(how):
    q, k, v, lo, hi, first, second = pieces()
    out = definition(q, k, v, lo, hi, causal=False)
    do, dlse = cotangent = random_like(out, jax.random.key(1))
    _, (dq, dk, dv) = pullback_of(lambda *x: definition(*x, causal=False), (0, 1, 2))(
        (q, k, v, lo, hi), cotangent
    )
    delta = jnp.einsum("bthe,bthe->bht", do, out[0], precision="highest") - dlse
    base = random_like((dq, dk, dv), jax.random.key(2))
    sums = [base[0]]
    for n, (k_n, v_n, lo_n, hi_n) in enumerate((first, second)):
        part = slice(0, CUT) if n == 0 else slice(CUT, None)
        accumulate = (sums[0], base[1][:, part], base[2][:, part])
        total = block_backward(
            q, k_n, v_n, do, out[1], delta, lo=lo_n, hi=hi_n, accumulate=accumulate, **how
        )
        plain = block_backward(q, k_n, v_n, do, out[1], delta, lo=lo_n, hi=hi_n, **how)
        assert_close(total, [a + g for a, g in zip(accumulate, plain, strict=True)], 1e-6)
        sums = [total[0], *sums[1:], *total[1:]]
    assert_close(sums[0], base[0] + dq, 4e-6)
    assert_close(jnp.concatenate(sums[1::2], 1), base[1] + dk, 4e-6)
    assert_close(jnp.concatenate(sums[2::2], 1), base[2] + dv, 4e-6)


@backends
def test_narrow_inputs_are_not_rounded_between_blocks(how):
    q, _, _, lo, hi, first, second = pieces(dtype=jnp.bfloat16)
    carry = None
    for k_n, v_n, lo_n, hi_n in (first, second):
        carry = block_forward(q, k_n, v_n, lo=lo_n, hi=hi_n, carry=carry, **how)
    do, lse = carry
    assert do.dtype == lse.dtype == jnp.float32
    zeros = tuple(jnp.zeros(x.shape) for x in (q, first[0], first[1]))
    delta = jnp.zeros_like(lse)
    args = (q, *first[:2], do, lse, delta)
    wide = block_backward(*args, lo=lo, hi=hi, accumulate=zeros, **how)
    narrow = block_backward(*args, lo=lo, hi=hi, **how)
    assert {x.dtype for x in wide} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in narrow} == {jnp.dtype(jnp.bfloat16)}
    assert_close(narrow, [x.astype(jnp.bfloat16) for x in wide], 0.0)


def test_merge_is_exact_and_differentiable():
    q, k, v, lo, hi, *_ = pieces()

    def halves(q, k, v):
        first = definition(q, k[:, :CUT], v[:, :CUT], lo, hi, causal=False)
        second = definition(q, k[:, CUT:], v[:, CUT:], lo - CUT, hi - CUT, causal=False)
        return merge(*first, *second)

    def whole(q, k, v):
        return definition(q, k, v, lo, hi, causal=False)

    cotangent = random_like(whole(q, k, v), jax.random.key(3))
    got, want = (pullback_of(f, (0, 1, 2))((q, k, v), cotangent) for f in (halves, whole))
    assert_close(got, want, 4e-6)


def test_merge_of_empty_rows():
    o = jnp.zeros((1, 3, 1, 2))
    lse = jnp.asarray([[[-jnp.inf, 0.5, -jnp.inf]]])
    other = jnp.ones((1, 3, 1, 2)), jnp.asarray([[[-jnp.inf, -jnp.inf, 2.0]]])
    (merged, total), pullback = jax.vjp(merge, o, lse, *other)
    np.testing.assert_array_equal(merged[0, :, 0, 0], [0.0, 0.0, 1.0])
    np.testing.assert_array_equal(total[0, 0], [-np.inf, 0.5, 2.0])
    gradients = pullback((jnp.ones_like(merged), jnp.ones_like(total)))
    assert all(np.isfinite(g).all() for g in gradients)


def test_merge_of_far_apart_lse_does_not_overflow():
    o1, o2 = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    merged, lse = merge(o1, jnp.full((1, 1, 1), 1e30), o2, jnp.full((1, 1, 1), -1e30))
    assert (merged.item(), lse.item()) == (1.0, np.float32(1e30))
