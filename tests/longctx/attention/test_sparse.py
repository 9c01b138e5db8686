"""Query/key dropping and hash buckets against dense masked attention, and that nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import intervals, sparse
from longctx.attention.coded_cache import coded_cache_attention
from longctx.attention.rows import count_earlier, invert, move, of_code
from tests.harness import assert_close, value_and_gradients
from tests.longctx.attention.dense import masked_attention, relative_error

B, H, D, E = 2, 3, 8, 4


@functools.cache
def qkv(length, seed=0, value_width=E):
    keys = jax.random.split(jax.random.key(seed), 3)
    widths = (D, D, value_width)
    return tuple(
        jax.random.normal(key, (B, length, H, w)) for key, w in zip(keys, widths, strict=True)
    )


def causal(length, strict=False):
    return np.tril(np.ones((length, length), bool), -1 if strict else 0)[None, None]


def documents(length):
    """Two packed layouts, one per batch element; the second begins before the array."""
    starts = [[0, length // 3, length // 2], [-5, length - 2]]
    rows = [[max(s for s in row if s <= max(t, 0)) for t in range(length)] for row in starts]
    return jnp.asarray(rows, jnp.int32)


def in_document(doc_start):
    keys = np.arange(doc_start.shape[1])
    return (keys >= np.asarray(doc_start)[..., None])[:, None]


def hash_mask(q_hashes, k_hashes, strict):
    q_hashes, k_hashes = np.asarray(q_hashes), np.asarray(k_hashes)
    same = q_hashes[:, :, None] == k_hashes[:, None]
    return np.moveaxis(same, -1, 1) & causal(q_hashes.shape[1], strict)


def drop_mask(keep_q, keep_k):
    keep_q, keep_k = np.asarray(keep_q), np.asarray(keep_k)
    pairs = keep_q[:, :, None] & keep_k[:, None]
    return np.moveaxis(pairs, -1, 1) & causal(keep_q.shape[1])


# What is tested is the order and the intervals; the kernels have tests of their own, and two of
# the cases below go through the one that "auto" chooses.
REFERENCE = {"backend": "reference"}


def check(function, mask, args, tolerance=2e-6):
    """Value and gradients in q, k, v against float64 dense masked attention."""
    do = jax.random.normal(jax.random.key(7), args[2].shape)
    got = value_and_gradients(function, args, (0, 1, 2), do)
    assert_close(got, masked_attention(*args, np.asarray(mask), do), tolerance)


@pytest.mark.parametrize(
    "length, tied, strict, packed",
    [
        (130, True, True, False),
        (130, False, False, True),
        (15, True, False, True),
        pytest.param(15, False, True, False, marks=pytest.mark.slow),
        (1, True, True, False),
        pytest.param(1, False, False, True, marks=pytest.mark.slow),
    ],
)
def test_hash_equals_dense(length, tied, strict, packed):
    nb = 4
    keys = jax.random.split(jax.random.key(1))
    q_hashes, k_hashes = (jax.random.randint(k, (B, length, H), 0, nb) for k in keys)
    k_hashes = q_hashes if tied else k_hashes
    doc_start = documents(length) if packed else None
    mask = hash_mask(q_hashes, k_hashes, strict)
    if packed:
        mask = mask & in_document(doc_start)

    def run(q, k, v):
        hashes = q_hashes if tied else (q_hashes, k_hashes)
        return sparse.hash_sparse_attention(
            q,
            k,
            v,
            num_buckets=nb,
            hashes=hashes,
            tied=tied,
            strict=strict,
            doc_start=doc_start,
            backend="auto" if length == 130 and tied else "reference",
        )

    check(run, mask, qkv(length))


@pytest.mark.parametrize("length, packed", [(130, True), (15, False), (1, True)])
def test_drop_equals_dense(length, packed):
    keys = jax.random.split(jax.random.key(2))
    # The heads keep different numbers of rows; the last drops nearly everything.
    share = jnp.asarray([0.9, 0.5, 0.05])[None, None]
    keep_q, keep_k = (jax.random.uniform(k, (B, length, H)) < share for k in keys)
    doc_start = documents(length) if packed else None
    mask = drop_mask(keep_q, keep_k)
    if packed:
        mask = mask & in_document(doc_start)

    def run(q, k, v):
        return sparse.qk_sparse_attention(
            q,
            k,
            v,
            keep_q,
            keep_k,
            capacity_q=length,
            capacity_k=length,
            doc_start=doc_start,
            backend="auto" if length == 130 else "reference",
        )

    check(run, mask, qkv(length))


@pytest.mark.parametrize(
    "length, nb, dense, expected",
    [
        (8192, 8, 2080, 344),
        (8192, 16, 2080, 221),
        pytest.param(16384, 16, 8256, 697, marks=pytest.mark.slow),
        pytest.param(32768, 8, 32896, 4448, marks=pytest.mark.slow),
        pytest.param(32768, 16, 32896, 2416, marks=pytest.mark.slow),
        pytest.param(32768, 32, 32896, 1401, marks=pytest.mark.slow),
    ],
)
def test_hash_visits_the_tiles_that_intervals_need(length, nb, dense, expected):
    """Means for uniform buckets; one head differs from them by 2% at most."""
    hashes = jax.random.randint(jax.random.key(0), (1, length, 8), 0, nb)
    plan = jax.jit(functools.partial(intervals.plan_hash, num_buckets=nb))(hashes, None)
    tiles = float(intervals.visited_tiles(plan).mean())
    assert abs(tiles - expected) < 0.01 * expected
    assert tiles < dense


def test_visited_tiles_are_those_with_a_pair():
    length, tile = 256, 16
    hashes = jax.random.randint(jax.random.key(0), (B, length, H), 0, 4)
    plan = jax.jit(lambda hashes: intervals.plan_hash(hashes, None, num_buckets=4))(hashes)
    order = plan.q_source
    codes = jnp.take_along_axis(jnp.swapaxes(hashes, 1, 2), order, -1)
    pairs = (codes[..., None] == codes[..., None, :]) & (order[..., None] > order[..., None, :])
    tiles = pairs.reshape(B, H, length // tile, tile, -1, tile).any((3, 5))
    np.testing.assert_array_equal(intervals.visited_tiles(plan, tile), tiles.sum((2, 3)))


@pytest.mark.parametrize(
    "length, dropped, fewer",
    [
        (8192, 0.5, 3.77),
        pytest.param(32768, 0.3, 2.02, marks=pytest.mark.slow),
        pytest.param(32768, 0.7, 10.8, marks=pytest.mark.slow),
    ],
)
def test_drop_visits_the_square_of_what_is_kept(length, dropped, fewer):
    keep = jax.random.uniform(jax.random.key(0), (1, length, 4)) >= dropped
    capacity = int((1 - dropped) * length) + 256
    plan = jax.jit(functools.partial(intervals.plan_drop, capacity_q=capacity, capacity_k=capacity))
    tiles = float(intervals.visited_tiles(plan(keep, keep)).mean())
    dense = length // 128 * (length // 128 + 1) / 2
    assert dense / tiles == pytest.approx(fewer, rel=0.03)


def test_capacity_drops_the_latest_and_reports_them():
    length, capacity_q, capacity_k = 60, 17, 11
    keys = jax.random.split(jax.random.key(3))
    keep_q, keep_k = (jax.random.uniform(k, (B, length, H)) < 0.5 for k in keys)
    first_q = keep_q & (jnp.cumsum(keep_q, 1) <= capacity_q)
    first_k = keep_k & (jnp.cumsum(keep_k, 1) <= capacity_k)
    run = functools.partial(
        sparse.qk_sparse_attention,
        keep_q=keep_q,
        keep_k=keep_k,
        capacity_q=capacity_q,
        capacity_k=capacity_k,
        **REFERENCE,
    )
    check(run, drop_mask(first_q, first_k), qkv(length))
    lost = sparse.overflow(keep_k, capacity_k)
    np.testing.assert_array_equal(lost, (keep_k & ~first_k).sum(1))
    assert (lost > 0).all()


def test_long_orders_are_filled_to_whole_tiles():
    """Beyond 2048 rows there are empty places at the end; they change nothing."""
    length = 2100
    q, k, v = (x[:1, :, :1] for x in qkv(length))
    hashes = jax.random.randint(jax.random.key(0), (1, length, 1), 0, 4)
    keep = hashes > 0
    plans = (
        intervals.plan_hash(hashes, None, num_buckets=4),
        intervals.plan_drop(keep, keep, capacity_q=2050, capacity_k=2050),
    )
    masks = (hash_mask(hashes, hashes, True), drop_mask(keep, keep))
    for plan, mask in zip(plans, masks, strict=True):
        assert plan.lo.shape[-1] == 2304
        run = jax.jit(functools.partial(intervals.attend, **REFERENCE))
        assert_close(run(plan, q, k, v), masked_attention(q, k, v, mask), 3e-6)


def test_one_bucket_and_no_dropping_are_dense_causal_attention():
    args = qkv(33)
    keep = jnp.ones((B, 33, H), bool)
    check(
        lambda q, k, v: sparse.hash_sparse_attention(
            q, k, v, num_buckets=1, key=jax.random.key(0), strict=False, **REFERENCE
        ),
        causal(33),
        args,
    )
    check(
        lambda q, k, v: sparse.qk_sparse_attention(
            q, k, v, keep, keep, capacity_q=33, capacity_k=33, **REFERENCE
        ),
        causal(33),
        args,
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_hashes_may_be_narrow(dtype):
    """Codes times the length, 120 buckets times 300 tokens, fit none of them."""
    length, nb = 300, 120
    hashes = jax.random.randint(jax.random.key(0), (B, length, H), 0, nb)
    run = functools.partial(
        sparse.hash_sparse_attention,
        *qkv(length),
        num_buckets=nb,
        doc_start=documents(length),
        **REFERENCE,
    )
    np.testing.assert_array_equal(run(hashes=hashes.astype(dtype)), run(hashes=hashes))


def test_cached_scores_are_not_rounded():
    """One bucket is dense causal attention; the cache must come as near to it as the full pass."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 256, 2, 64)) for key in keys)
    q, k, v = (x.astype(jnp.bfloat16) for x in (3 * q, 3 * k, v))
    codes = jnp.zeros((1, 256, 2), jnp.int32)
    want = masked_attention(q, k, v, causal(256))
    full = sparse.hash_sparse_attention(q, k, v, num_buckets=1, hashes=codes, strict=False)
    start = jnp.zeros(1, jnp.int32)
    cached = coded_cache_attention(q, k, v, codes, codes, start, strict=False)
    assert relative_error(cached, want) < 1.3 * relative_error(full, want)


LENGTH, BUCKETS = 24, 6
codes = st.lists(st.integers(0, BUCKETS - 1), min_size=LENGTH, max_size=LENGTH)
masks = st.lists(
    st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=H, max_size=H
).map(lambda heads: jnp.broadcast_to(jnp.asarray(heads).T[None], (B, LENGTH, H)))


@jax.jit
def attend_and_pull(plan, args, do):
    """All plans of one shape share this program."""
    o, pull = jax.vjp(lambda *args: intervals.attend(plan, *args, **REFERENCE), *args)
    return o, pull(do)


def check_plan(plan, mask, seed):
    args = qkv(LENGTH, seed=seed)
    do = jax.random.normal(jax.random.key(seed), args[2].shape)
    expected = masked_attention(*args, np.asarray(mask), do)
    o, grads = attend_and_pull(plan, args, do)
    assert_close((o, grads), expected, 2e-6)
    stranded = ~np.moveaxis(np.asarray(mask).any(-1), 1, 2)
    assert (np.asarray(o)[stranded] == 0).all()


plan_hash = jax.jit(intervals.plan_hash, static_argnames=("num_buckets", "strict"))
plan_drop = jax.jit(intervals.plan_drop, static_argnames=("capacity_q", "capacity_k"))


@settings(max_examples=25, deadline=None)
@given(codes, codes, st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_hashes_equal_dense(q_row, k_row, tied, strict, seed):
    """Value and gradients for skewed and empty buckets, each head's shifted by one."""
    shift = jnp.arange(H, dtype=jnp.int32)[None]
    q_hashes, k_hashes = (
        jnp.broadcast_to(((jnp.asarray(x)[:, None] + shift) % BUCKETS)[None], (B, LENGTH, H))
        for x in (q_row, q_row if tied else k_row)
    )
    plan = plan_hash(q_hashes, None if tied else k_hashes, num_buckets=BUCKETS, strict=strict)
    check_plan(plan, hash_mask(q_hashes, k_hashes, strict), seed)


@settings(max_examples=15, deadline=None)
@given(masks, masks, st.integers(0, 99))
def test_any_masks_equal_dense(keep_q, keep_k, seed):
    """Value and gradients; heads keep different numbers of rows, some of them none."""
    plan = plan_drop(keep_q, keep_k, capacity_q=LENGTH, capacity_k=LENGTH)
    check_plan(plan, drop_mask(keep_q, keep_k), seed)


def check_no_leak(run, length, *rows):
    """`run(q, k, v, *rows)`: whatever changes from a token on changes no output before it.

    `rows` are pairs: what every token carries, and what it carries after the change.
    """
    before, other = qkv(length), qkv(length, seed=9)
    first = run(*before, *(row for row, _ in rows))
    for cut in (1, 13, 41):
        changed = [
            x.at[:, cut:].set(y[:, cut:]) for x, y in (*zip(before, other, strict=True), *rows)
        ]
        again = run(*changed)
        np.testing.assert_allclose(again[:, :cut], first[:, :cut], atol=1e-6)
        assert not np.allclose(again[:, cut:], first[:, cut:], atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_hash_leaks_no_future(tied):
    """Buckets included: they are drawn from the tokens themselves."""
    hashed = functools.partial(sparse.hash_sparse_attention, num_buckets=4, tied=tied)
    check_no_leak(
        jax.jit(lambda *args: hashed(*args, key=jax.random.key(5), strict=False, **REFERENCE)), 70
    )


def test_random_drop_leaks_no_future():
    """Not even beyond the capacities, which the longer masks exceed."""
    keep, other = (jax.random.uniform(jax.random.key(s), (B, 70, H)) < 0.6 for s in (0, 1))
    sizes = {"capacity_q": 40, "capacity_k": 30}
    run = jax.jit(functools.partial(sparse.qk_sparse_attention, **sizes, **REFERENCE))
    check_no_leak(run, 70, (keep, other), (keep, other))


def test_rematerialisation_draws_the_same_buckets():
    args, key = qkv(64, value_width=D), jax.random.key(4)

    def loss(q, k, v):
        o = sparse.hash_sparse_attention(q, k, v, num_buckets=4, key=key, **REFERENCE)
        return (o * v).sum()

    plain = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
    again = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*args)
    assert_close(again, plain, 1e-6)


def test_hash_rows_ignores_length_and_splits_directions():
    matrix = sparse.hash_matrix(jax.random.key(0), H, D, 8)
    np.testing.assert_allclose(jnp.linalg.norm(matrix, axis=1), 1.0, rtol=1e-6)
    x = qkv(256)[0]
    codes = sparse.hash_rows(x, matrix)
    np.testing.assert_array_equal(codes, sparse.hash_rows(3.0 * x, matrix))
    np.testing.assert_array_equal((codes + 4) % 8, sparse.hash_rows(-x, matrix))
    assert np.bincount(np.asarray(codes).ravel(), minlength=8).min() > 60


@pytest.mark.parametrize("width", [6, 5])
def test_bfloat16_moves_are_exact_both_ways(width):
    """Rows travel as 32-bit words when the width is even."""
    x = jax.random.normal(jax.random.key(0), (B, 40, H, width)).astype(jnp.bfloat16)
    codes = jax.random.randint(jax.random.key(1), (B, H, 40), 0, 3)

    @jax.jit
    def run(x, codes):
        earlier, held = count_earlier(codes, codes, 3)
        slot = of_code((jnp.cumsum(held, -1) - held)[:, :, None], codes) + earlier
        source = invert(slot, 40)
        y, pull = jax.vjp(lambda x: move(x, source, slot), x)
        return source, move(y, slot, source), pull(y)[0]

    source, back, dx = run(x, codes)
    np.testing.assert_array_equal(source, jnp.argsort(codes, axis=-1, stable=True))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(dx, x)


@pytest.mark.parametrize(
    "change",
    [
        dict(key=None),
        dict(hashes=jnp.zeros((B, 16, H), jnp.int32)),
        dict(key=None, hashes=jnp.zeros((B, 16, H), jnp.int32), tied=False),
        dict(num_buckets=3),
        dict(num_buckets=2**29),
        dict(key=None, hashes=jnp.full((B, 16, H), 4)),
        dict(key=None, hashes=jnp.full((B, 16, H), -1)),
        dict(key=None, hashes=jnp.zeros((B, 16, 1), jnp.int32)),
        dict(key=None, hashes=jnp.zeros((B, 16, H))),
        dict(key=None, hashes=jnp.zeros((B, 16, H), bool)),
        dict(doc_start=jnp.zeros((B, 1), jnp.int32)),
        dict(doc_start=jnp.zeros((B, 16))),
    ],
)
def test_hash_refuses(change):
    arguments = dict(num_buckets=4, key=jax.random.key(0)) | change
    rules = (
        r"key and hashes|tied=|num_buckets=|\[0, 4\)|q's \[B|hashes must be int|doc_start must be"
    )
    with pytest.raises(ValueError, match=rules):
        sparse.hash_sparse_attention(*qkv(16), **arguments)


@pytest.mark.parametrize(
    "given", [{"key": jax.random.key(0)}, {"hashes": jnp.zeros((B, 0, H), int)}]
)
def test_hash_refuses_an_empty_sequence(given):
    with pytest.raises(ValueError, match="no axis may be empty"):
        sparse.hash_sparse_attention(*qkv(0), num_buckets=4, **given)


def test_drop_refuses():
    q, k, v = qkv(16)
    keep = jnp.ones((B, 16, H), bool)
    with pytest.raises(ValueError, match="keep_k has shape"):
        sparse.qk_sparse_attention(q, k, v, keep, keep[:, :8], capacity_q=16, capacity_k=16)
    with pytest.raises(ValueError, match="agree"):
        sparse.qk_sparse_attention(
            q, k[:, :, :1], v[:, :, :1], keep, keep, capacity_q=16, capacity_k=16
        )
    with pytest.raises(ValueError, match="capacity"):
        sparse.qk_sparse_attention(q, k, v, keep, keep, capacity_q=16, capacity_k=0)
    run = functools.partial(sparse.qk_sparse_attention, capacity_q=16, capacity_k=16)
    with pytest.raises(ValueError, match="keep_k must be bool, got uint8"):
        run(q, k, v, keep, 255 * keep.astype(jnp.uint8))
    for doc_start in (jnp.zeros((B, 1), jnp.int32), jnp.zeros((B, 16))):
        with pytest.raises(ValueError, match="doc_start must be integer"):
            run(q, k, v, keep, keep, doc_start=doc_start)
    with pytest.raises(ValueError, match="no axis may be empty"):
        run(*qkv(0), keep[:, :0], keep[:, :0])
