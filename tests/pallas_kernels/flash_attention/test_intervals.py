"""Tile bounds against the mask written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import Tiles
from pallas_kernels.flash_attention.api import make_spec
from pallas_kernels.flash_attention.intervals import column_bounds, row_bounds
from pallas_kernels.flash_attention.reference import visible
from tests.pallas_kernels.flash_attention.cases import inputs, random_intervals

TILES = Tiles(8, 16)


@functools.partial(jax.jit, static_argnums=0)
def _bounds(spec, lo, hi):
    return row_bounds(spec, lo, hi, TILES), column_bounds(spec, lo, hi, TILES)


def mask_and_bounds(mask, lo=None, hi=None, length=63, kv_length=50):
    """The mask cut into tiles `[b, h, rows, columns, q, kv]`, row bounds, column bounds."""
    spec = make_spec(*inputs(1, length, kv_length, heads=4), lo, **mask)
    seen = np.asarray(visible(lo, hi, spec))
    blocks = -(-length // TILES.q), -(-kv_length // TILES.kv)
    padding = [(0, n * t - x) for n, t, x in zip(blocks, (8, 16), (length, kv_length), strict=True)]
    seen = np.pad(seen, [(0, 0), (0, 0), *padding])
    seen = seen.reshape(*seen.shape[:2], blocks[0], TILES.q, blocks[1], TILES.kv).swapaxes(3, 4)
    real = np.pad(np.ones(length, bool), padding[0]).reshape(blocks[0], 1, TILES.q, 1)
    bounds = _bounds(spec, lo, hi)
    return seen, real, *([np.asarray(x) for x in b] for b in bounds)


def members(start, stop, count):
    index = np.arange(count)
    return (start[..., None] <= index) & (index < stop[..., None])


def check(seen, real, rows, columns):
    """Tiles with work run, mask-free tiles are full, and nothing runs without need."""
    some, whole = seen.any((-1, -2)), (seen | ~real).all((-1, -2))
    count_q, count_kv = some.shape[2:]
    runs, free = members(*rows[:2], count_kv), members(*rows[2:], count_kv)
    assert not (some & ~runs).any() and not (free & ~whole).any() and not (free & ~runs).any()
    transposed = members(*columns[:2], count_q).swapaxes(2, 3)
    free_t = members(*columns[2:], count_q).swapaxes(2, 3)
    assert not (some & ~transposed).any() and not (free_t & ~whole).any()
    assert not (free_t & ~transposed).any()
    # Tight: the first and last tile of a range are there for a reason.
    for ranges, needed, axis in ((runs, some, 3), (transposed, runs, 2)):
        for flip in (slice(None), slice(None, None, -1)):
            first = np.moveaxis(ranges, axis, -1)[..., flip].argmax(-1)
            wanted = np.moveaxis(needed, axis, -1)[..., flip].argmax(-1)
            occupied = ranges.any(axis)
            np.testing.assert_array_equal(first[occupied], wanted[occupied])
    return free, free_t, whole


@pytest.mark.parametrize("offset", [5, -20])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_static_masks_lose_no_mask_free_tile(causal, window, offset):
    seen, real, rows, columns = mask_and_bounds(
        {"causal": causal, "window": window, "q_offset": offset}
    )
    free, free_t, whole = check(seen, real, rows, columns)
    np.testing.assert_array_equal(free, whole)
    np.testing.assert_array_equal(free_t, whole)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_random_intervals(seed):
    intervals = random_intervals((1, 4, 63), 50, seed)
    check(*mask_and_bounds({"causal": False}, *intervals))


def test_packed_documents_run_only_their_own_tiles():
    starts = jnp.asarray((np.arange(64) // 16 * 16)[None, None], jnp.int32)
    *_, rows, columns = mask_and_bounds({}, starts, starts + 16, 64, 64)
    np.testing.assert_array_equal(rows[1] - rows[0], 1)
    np.testing.assert_array_equal(columns[1] - columns[0], 2)


def test_nothing_seen():
    nothing = jnp.zeros((1, 1, 63), jnp.int32)
    *_, rows, columns = mask_and_bounds({}, nothing, nothing)
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(columns[0], columns[1])
