"""Attention in pieces: merge, a carry from earlier keys, gradients added up over keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import (
    Pieces,
    Tiles,
    block_backward,
    block_forward,
    merge,
    row_delta,
)
from tests.harness import assert_close, pullback_of, random_like
from tests.pallas_kernels.flash_attention.cases import definition, inputs, random_intervals

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BACKENDS = {
    "xla": {"backend": "xla", "tiles": Tiles(16, 8)},
    "reference": {"backend": "reference"},
}
backends = pytest.mark.parametrize("how", BACKENDS.values(), ids=BACKENDS)
CUT = 25  # keys of each of the two blocks


def pieces(batch=2, length=33, dtype=jnp.float32):
    """Inputs, intervals over all keys, and (k, v, lo, hi) of the two blocks of keys."""
    q, k, v = inputs(batch, length, 2 * CUT, heads=4, kv_heads=2, dtype=dtype)
    lo, hi = random_intervals((batch, length), 2 * CUT)
    first = (k[:, :CUT], v[:, :CUT], lo, hi)
    second = (k[:, CUT:], v[:, CUT:], lo - CUT, hi - CUT)
    return q, k, v, lo, hi, first, second


@backends
def test_carry_equals_concatenation(how):
    q, k, v, lo, hi, first, second = pieces()
    carry = jnp.zeros_like(q), jnp.full((2, 4, 33), -jnp.inf)
    for k_n, v_n, lo_n, hi_n in (first, second):
        carry = block_forward(q, k_n, v_n, lo=lo_n, hi=hi_n, carry=carry, soft_cap=3.0, **how)
    assert_close(carry, definition(q, k, v, lo, hi, causal=False, soft_cap=3.0), 2e-6)


@backends
def test_keys_in_pieces_and_the_last_rows_some_of_which_continue(how):
    """Two arrays of two pieces each; of rows 5 to 32 those from 20 on have seen other keys."""
    q, k, v = inputs(2, 33, 48, heads=4, kv_heads=2)
    _, k_before, v_before = inputs(2, 33, 10, heads=4, kv_heads=2, seed=1)
    lo, hi = random_intervals((2, 28), 48)
    order = [2, 0, 3, 1]

    def cut(x):
        pieces = x.reshape(2, 4, 12, *x.shape[2:])[:, np.argsort(order)]  # by their numbers
        return Pieces(jnp.split(pieces.reshape(x.shape), 2, axis=1), jnp.array(order))

    assert_close(cut(k).joined(), k, 0.0)
    carry = block_forward(q, k_before, v_before, first_row=20, **how)
    found = block_forward(q, cut(k), cut(v), first_row=5, lo=lo, hi=hi, carry=carry, **how)
    want = definition(q[:, 5:], k, v, lo, hi, causal=False)
    before = definition(q[:, 20:], k_before, v_before, causal=False)
    late = merge(*before, want[0][:, 15:], want[1][..., 15:])
    want = [jnp.concatenate([x[:, :15], y], 1) for x, y in zip(want[:1], late[:1], strict=True)] + [
        jnp.concatenate([want[1][..., :15], late[1]], 2)
    ]
    assert_close(found, want, 2e-6)
    causal = block_forward(q, k, v, first_row=20, causal=True, **how)
    whole = definition(q, k, v)
    assert_close(causal, (whole[0][:, 20:], whole[1][..., 20:]), 2e-6)


@backends
def test_accumulated_gradients_equal_those_of_all_keys(how):
    q, k, v, lo, hi, first, second = pieces()
    out = definition(q, k, v, lo, hi, causal=False)
    do, dlse = cotangent = random_like(out, jax.random.key(1))
    _, gradients = pullback_of(lambda *x: definition(*x, causal=False), (0, 1, 2))(
        (q, k, v, lo, hi), cotangent
    )
    delta = jnp.einsum("bthe,bthe->bht", do, out[0], precision="highest") - dlse
    base = random_like(gradients, jax.random.key(2))
    dq, hops = base[0], []
    for part, (k_n, v_n, lo_n, hi_n) in zip(
        (slice(0, CUT), slice(CUT, None)), (first, second), strict=True
    ):
        accumulate = (dq, base[1][:, part], base[2][:, part])
        dq, *dk_dv = block_backward(
            q, k_n, v_n, do, out[1], delta, lo=lo_n, hi=hi_n, accumulate=accumulate, **how
        )
        hops.append(dk_dv)
    dk, dv = (jnp.concatenate(x, 1) for x in zip(*hops, strict=True))
    assert_close((dq, dk, dv), [b + g for b, g in zip(base, gradients, strict=True)], 4e-6)


@backends
def test_each_gradient_may_have_a_sum_or_none(how):
    q, _, _, lo, hi, (k, v, *_), _ = pieces(dtype=jnp.bfloat16)
    o, lse = block_forward(q, k, v, lo=lo, hi=hi, **how)
    gradients = functools.partial(
        block_backward, q, k, v, o, lse, jnp.zeros_like(lse), lo=lo, hi=hi, **how
    )
    plain = gradients(out_dtype=jnp.float32)
    sums = random_like(plain, jax.random.key(1))
    for given in range(3):
        got = gradients(accumulate=tuple(x if i == given else None for i, x in enumerate(sums)))
        for i, x in enumerate(got):
            want = plain[i] + sums[i] if i == given else plain[i].astype(jnp.bfloat16)
            assert x.dtype == want.dtype
            assert_close(x, want, 1e-6)


@backends
def test_narrow_inputs_are_not_rounded_between_blocks(how):
    q, _, _, lo, hi, (k, v, *_), _ = pieces(dtype=jnp.bfloat16)
    mask = dict(lo=lo, hi=hi, **how)
    o, lse = jax.eval_shape(lambda: block_forward(q, k, v, **mask))
    assert o.dtype == lse.dtype == jnp.float32
    last, _ = jax.eval_shape(lambda: block_forward(q, k, v, out_dtype=q.dtype, **mask))
    assert last.dtype == q.dtype
    sums = tuple(jnp.zeros(x.shape) for x in (q, k, v))
    for accumulate, out_dtype, dtype in (
        (sums, None, jnp.float32),
        (None, jnp.float32, jnp.float32),
        (None, None, jnp.bfloat16),
    ):
        options = {"accumulate": accumulate, "out_dtype": out_dtype, **mask}
        gradients = jax.eval_shape(
            lambda o, lse, options=options: block_backward(q, k, v, o, lse, lse, **options), o, lse
        )
        assert {x.dtype for x in gradients} == {jnp.dtype(dtype)}


def test_delta_is_of_the_cotangent_as_rounded():
    """A program that makes do itself must not sum what do was before its rounding."""
    do, o = (jax.random.normal(jax.random.key(i), (1, 64, 2, 32)) for i in range(2))
    zeros = jnp.zeros((1, 2, 64))

    @jax.jit
    def delta(do):
        return row_delta(o, zeros, do.astype(jnp.bfloat16), zeros)

    rounded = np.asarray(do.astype(jnp.bfloat16), np.float64)
    want = (rounded * np.asarray(o)).sum(-1).swapaxes(1, 2)
    np.testing.assert_allclose(delta(do), want, atol=1e-5)


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
