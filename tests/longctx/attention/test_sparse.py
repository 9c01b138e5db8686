"""Query/key dropping and hash buckets against dense masked attention, and that nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import sparse
from longctx.attention.rows import count_earlier, invert, move, of_code
from tests.harness import assert_close, value_and_gradients
from tests.longctx.attention.dense import masked_attention

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


@pytest.mark.parametrize("length, nb, expected", [(8192, 8, 345), (16384, 16, 698)])
def test_hash_visits_the_tiles_that_intervals_need(length, nb, expected):
    """Uniform buckets; 2080 and 8256 tiles are dense causal attention's."""
    hashes = jax.random.randint(jax.random.key(0), (1, length, 4), 0, nb)
    plan = jax.jit(functools.partial(sparse.plan_hash, num_buckets=nb))(hashes, None)
    assert abs(float(sparse.visited_tiles(plan).mean()) - expected) < 0.01 * expected


def test_visited_tiles_are_those_with_a_pair():
    length, tile = 256, 16
    hashes = jax.random.randint(jax.random.key(0), (B, length, H), 0, 4)
    plan = jax.jit(lambda hashes: sparse.plan_hash(hashes, None, num_buckets=4))(hashes)
    order = plan.q_source
    codes = jnp.take_along_axis(jnp.swapaxes(hashes, 1, 2), order, -1)
    pairs = (codes[..., None] == codes[..., None, :]) & (order[..., None] > order[..., None, :])
    tiles = pairs.reshape(B, H, length // tile, tile, -1, tile).any((3, 5))
    np.testing.assert_array_equal(sparse.visited_tiles(plan, tile), tiles.sum((2, 3)))


def test_drop_visits_the_square_of_what_is_kept():
    length = 8192
    keep = jax.random.uniform(jax.random.key(0), (1, length, 4)) < 0.5
    plan = jax.jit(functools.partial(sparse.plan_drop, capacity_q=4352, capacity_k=4352))
    tiles = float(sparse.visited_tiles(plan(keep, keep)).mean())
    assert tiles < 1.06 * 2080 / 4


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
        sparse.plan_hash(hashes, None, num_buckets=4),
        sparse.plan_drop(keep, keep, capacity_q=2050, capacity_k=2050),
    )
    masks = (hash_mask(hashes, hashes, True), drop_mask(keep, keep))
    for plan, mask in zip(plans, masks, strict=True):
        assert plan.lo.shape[-1] == 2304
        run = jax.jit(functools.partial(sparse.attend, **REFERENCE))
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


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_hashes_equal_dense(data):
    """Skewed and empty buckets, tied and untied, at a fixed shape so that it compiles twice."""
    length, nb = 24, 6
    draw = st.lists(st.integers(0, nb - 1), min_size=length, max_size=length)
    row = [jnp.asarray(data.draw(draw), jnp.int32) for _ in range(2)]
    strict, seed = data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    shift = jnp.arange(H, dtype=jnp.int32)[None]
    q_hashes, k_hashes = (
        jnp.broadcast_to(((x[:, None] + shift) % nb)[None], (B, length, H)) for x in row
    )
    q, k, v = qkv(length, seed=seed)
    got = _hash_untied(q, k, v, (q_hashes, k_hashes), nb, strict)
    assert_close(got, masked_attention(q, k, v, hash_mask(q_hashes, k_hashes, strict)), 2e-6)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _hash_untied(q, k, v, hashes, nb, strict):
    return sparse.hash_sparse_attention(
        q, k, v, num_buckets=nb, hashes=hashes, tied=False, strict=strict, **REFERENCE
    )


@pytest.mark.parametrize("tied", [True, False])
def test_hash_leaks_no_future(tied):
    """Buckets included: they are drawn from the tokens themselves."""
    length, cut = 70, 41
    run = jax.jit(
        lambda q, k, v: sparse.hash_sparse_attention(
            q, k, v, num_buckets=4, key=jax.random.key(5), tied=tied, strict=False, **REFERENCE
        )
    )
    before = run(*qkv(length))
    other = qkv(length, seed=9)
    mixed = [x.at[:, cut:].set(y[:, cut:]) for x, y in zip(qkv(length), other, strict=True)]
    after = run(*mixed)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], atol=1e-6)
    assert not np.allclose(before[:, cut:], after[:, cut:], atol=1e-3)


def test_random_drop_leaks_no_future():
    length, cut = 70, 41
    keep, other_keep = (jax.random.uniform(jax.random.key(s), (B, length, H)) < 0.6 for s in (0, 1))
    keep_later = keep.at[:, cut:].set(other_keep[:, cut:])
    run = jax.jit(
        functools.partial(sparse.qk_sparse_attention, capacity_q=40, capacity_k=30, **REFERENCE)
    )
    before = run(*qkv(length), keep, keep)
    mixed = [
        x.at[:, cut:].set(y[:, cut:]) for x, y in zip(qkv(length), qkv(length, seed=9), strict=True)
    ]
    after = run(*mixed, keep_later, keep_later)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], atol=1e-6)


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
    ],
)
def test_hash_refuses(change):
    arguments = dict(num_buckets=4, key=jax.random.key(0)) | change
    with pytest.raises(ValueError):
        sparse.hash_sparse_attention(*qkv(16), **arguments)


def test_refuses_grouped_keys_and_no_capacity():
    q, k, v = qkv(16)
    keep = jnp.ones((B, 16, H), bool)
    with pytest.raises(ValueError, match="agree"):
        sparse.qk_sparse_attention(
            q, k[:, :, :1], v[:, :, :1], keep, keep, capacity_q=16, capacity_k=16
        )
    with pytest.raises(ValueError, match="capacity"):
        sparse.qk_sparse_attention(q, k, v, keep, keep, capacity_q=16, capacity_k=0)
