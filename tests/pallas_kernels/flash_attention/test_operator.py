"""flash_attention against the dense definition: values, lse and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import Tiles, flash_attention
from tests.harness import assert_close, check_op, pullback_of, random_like
from tests.pallas_kernels.flash_attention.cases import (
    TOLERANCE,
    definition,
    inputs,
    random_intervals,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


SMALL = Tiles(16, 32)


def attend(q, k, v, lo=None, hi=None, *, backend="xla", tiles=SMALL, **mask):
    tiles = tiles if backend == "xla" else None
    return flash_attention(
        q, k, v, lo=lo, hi=hi, return_lse=True, backend=backend, tiles=tiles, **mask
    )


def check(args, backend="xla", tiles=SMALL, **mask):
    value, gradient = TOLERANCE[args[0].dtype]
    check_op(
        functools.partial(attend, backend=backend, tiles=tiles, **mask),
        functools.partial(definition, **mask),
        args,
        wrt=(0, 1, 2),
        tolerance=value,
        grad_tolerance=gradient,
    )


MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 20, "q_offset": 11},
    "window of one": {"window": 1},
    "earlier, first rows empty": {"q_offset": -17},
    "one-sided window, capped, scaled": {
        "causal": False,
        "window": 9,
        "q_offset": 3,
        "soft_cap": 1.5,
        "scale": 0.4,
    },
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_static_masks(mask):
    check(inputs(length=63, kv_length=50), **mask)


def test_reference():
    mask = {"window": 30, "q_offset": -5, "soft_cap": 1.5, "scale": 0.4}
    args = inputs(2, 63, 50, heads=4, kv_heads=2, value_width=24)
    check([*args, *random_intervals((2, 63), 50)], "reference", **mask)


@pytest.mark.parametrize("length", [1, 15, 500])
def test_lengths(length):
    check(inputs(length=length, heads=1), tiles=Tiles(64, 128), window=200)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    check(inputs(length=200, heads=1, width=64, dtype=dtype), tiles=Tiles(64, 64))


def test_one_kv_head():
    check(inputs(2, 30, 45, heads=3, kv_heads=1, width=8), q_offset=15)


@pytest.mark.parametrize("shape", ["BT", "BHT"])
@pytest.mark.parametrize("backend", ["xla", "auto"])
def test_intervals(shape, backend):
    args = inputs(2, 63, 50, heads=4, kv_heads=2, value_width=24)
    intervals = random_intervals((2, 63) if shape == "BT" else (2, 4, 63), 50)
    check([*args, *intervals], backend, causal=False)


def test_intervals_meet_causal_and_window():
    check([*inputs(2, 63, 50), *random_intervals((2, 63), 50)], q_offset=4, window=30)


def test_one_limit_alone():
    q, k, v = inputs()
    _, hi = random_intervals((1, 63), 63)
    check_op(
        lambda q, k, v: attend(q, k, v, hi=hi),
        lambda q, k, v: definition(q, k, v, hi=hi),
        (q, k, v),
        wrt=(0, 1, 2),
        tolerance=4e-6,
    )


def test_large_scores_do_not_overflow():
    q, k, v = inputs(length=40)
    o, lse = attend(1e3 * q, k, v)
    scores = jnp.einsum("bthd,bshd->bhts", 1e3 * q, k, precision="highest") / 4
    scores = jnp.where(jnp.tri(40, dtype=bool)[None, None], scores, -jnp.inf)
    assert_close(lse, jax.nn.logsumexp(scores, axis=-1), 1e-6)
    wanted = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v, precision="highest")
    assert_close(o, wanted, 1e-4)


def test_float64():
    with jax.enable_x64(True):
        args = inputs(length=33, dtype=jnp.float64)
        cotangent = jax.tree.map(jnp.ones_like, definition(*args))
        got, want = (pullback_of(f, (0, 1, 2))(args, cotangent) for f in (attend, definition))
        assert_close(got, want, 1e-14)


def test_gradient_of_lse_alone_against_float64():
    args = inputs(length=33, kv_length=40, heads=2, kv_heads=1)
    lo, hi = random_intervals((1, 2, 33), 40)
    dlse = random_like(jnp.zeros((1, 2, 33)), jax.random.key(3))

    def gradients(function, q, k, v, dlse, lo, hi):
        def lse(q, k):
            return function(q, k, v, lo, hi, causal=False)[1]

        return jax.vjp(lse, q, k)[1](dlse)

    got = jax.jit(functools.partial(gradients, attend))(*args, dlse, lo, hi)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (*args, dlse)]
        wide += [x.astype(jnp.int64) for x in (lo, hi)]
        want = jax.jit(functools.partial(gradients, definition))(*wide)
    assert_close(got, want, 1e-6)


@functools.cache
def _pullback(function):
    return pullback_of(functools.partial(function, causal=False), (0, 1, 2))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_random_intervals_are_exact(seed):
    args = (*inputs(1, 37, 45, heads=4, kv_heads=2), *random_intervals((1, 4, 37), 45, seed))
    cotangent = (
        inputs(1, 37, heads=4, seed=1)[0],
        random_like(jnp.zeros((1, 4, 37)), jax.random.key(2)),
    )
    assert_close(_pullback(attend)(args, cotangent), _pullback(definition)(args, cotangent), 4e-6)


@given(cut=st.integers(0, 36), seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_later_token_changes_nothing_earlier(cut, seed):
    q, k, v = inputs(length=37, seed=seed)
    changed = [x.at[:, cut:].add(1.0) for x in (q, k, v)]
    for before, after in zip(attend(q, k, v), attend(*changed), strict=True):
        time_axis = 1 if before.ndim == 4 else 2
        early = [jax.lax.slice_in_dim(x, 0, cut, axis=time_axis) for x in (before, after)]
        np.testing.assert_array_equal(*early)


def test_packed_documents_equal_separate_runs():
    lengths = (13, 1, 30, 19)
    q, k, v = inputs(length=sum(lengths))
    starts = np.cumsum((0, *lengths[:-1]))
    o, lse = attend(q, k, v, jnp.asarray(np.repeat(starts, lengths)[None], jnp.int32))
    for start, n in zip(starts, lengths, strict=True):
        alone = definition(*(x[:, start : start + n] for x in (q, k, v)))
        assert_close((o[:, start : start + n], lse[:, :, start : start + n]), alone, 2e-6)
