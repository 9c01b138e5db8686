"""Tensorized attention: its mathematics on composed matrices, and the operator against them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention.tensorized import (
    Hop,
    make_hops,
    tensorized_attention,
    tensorized_cache_attention,
)
from longctx.attention.tensorized import mixed_radix as operator_module
from tests.harness import assert_close, value_and_gradients
from tests.longctx.attention.dense import masked_attention, relative_error

B, H, K, D, E = 2, 4, 2, 8, 6
FREQUENCIES = 10.0 ** -np.arange(0, 2, 2 / (D // 2))


def inputs(length, seed=0, heads=H, kv_heads=K, value_width=E):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((heads, D), (kv_heads, D), (kv_heads, value_width))
    return tuple(
        jax.random.normal(key, (B, length, *shape)) for key, shape in zip(keys, shapes, strict=True)
    )


def strides(dims):
    return [math.prod(dims[:i]) for i in range(len(dims))]


def rotated(x, positions, frequencies):
    """RoPE, as pairs of features (j, j + D / 2)."""
    angle = (positions[:, None] * frequencies[None])[None, :, None]
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def hop_mask(length, stride, window, doc_start=None):
    t, s = np.arange(length)[:, None], np.arange(length)
    seen = (t >= s) & ((t - s) % stride == 0) & ((t - s) // stride < (window or length))
    seen = np.broadcast_to(seen, (B, 1, length, length))
    return jnp.asarray(seen) & same_document(doc_start)


def same_document(doc_start):
    if doc_start is None:
        return jnp.ones((1, 1, 1, 1), bool)
    return doc_start[:, None, :, None] == doc_start[:, None, None, :]


def packed_starts(length):
    """Documents that begin at 0, 7, 30 and at 0, 11; one of them before its row."""
    rows = [
        [max(s for s in starts if s <= max(t, 0)) for t in range(length)]
        for starts in ([0, 7, 30], [-3, 11])
    ]
    return jnp.asarray(rows, jnp.int32)


def scores(q, k, frequencies, stride, positions):
    time = jnp.arange(q.shape[1])
    time = time if positions == "global" else time // stride
    if frequencies is not None:
        q, k = (rotated(x, time, frequencies) for x in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * q.shape[-1] ** -0.5


def softmax(s, mask):
    return jax.nn.softmax(jnp.where(mask, s, -jnp.inf), axis=-1)


def mixed_radix(q, k, v, frequencies, self_bias, *, dims, order, positions="digit", doc_start=None):
    """The definition, with dense matrices."""
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    hops = list(enumerate(zip(strides(dims), dims, strict=True)))
    for i, (stride, window) in hops if order == "fast_first" else reversed(hops):
        s = scores(q, k, frequencies, stride, positions)
        if self_bias is not None and i:
            s = s + jnp.eye(q.shape[1])[None, None] * self_bias[i - 1][None, :, None, None]
        a = softmax(s, hop_mask(q.shape[1], stride, window, doc_start))
        v = jnp.einsum("bhts,bshe->bthe", a, v, precision="highest")
    return v


def digits(t, dims):
    return tuple(t // s % n for s, n in zip(strides(dims), dims, strict=True))


def fibre_mask(length, dims, i, compare):
    """Pairs that share every digit but the i-th, whose digits `compare`."""
    all_digits = [digits(t, dims) for t in range(length)]

    def seen(a, b):
        others = all(x == y for j, (x, y) in enumerate(zip(a, b, strict=True)) if j != i)
        return others and compare(b[i], a[i])

    return jnp.asarray([[seen(a, b) for b in all_digits] for a in all_digits])[None, None]


def dominance(q, k, v, frequencies, *, dims, order, positions="digit", doc_start=None):
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    hops = list(enumerate(strides(dims)))
    for i, stride in hops if order == "fast_first" else reversed(hops):
        mask = fibre_mask(q.shape[1], dims, i, lambda x, y: x <= y)
        mask = mask & same_document(doc_start)
        a = softmax(scores(q, k, frequencies, stride, positions), mask)
        v = jnp.einsum("bhts,bshe->bthe", a, v, precision="highest")
    return v


def hierarchical(q, k, v, frequencies, *, dims, positions="digit", doc_start=None):
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    length = q.shape[1]
    itself = jnp.eye(length, dtype=bool)[None, None]
    logits = [jnp.where(itself, scores(q, k, None, 1, "digit"), -jnp.inf)]
    values, f = [v], v
    for i, stride in enumerate(strides(dims)):
        s = scores(q, k, frequencies, stride, positions)
        mask = fibre_mask(length, dims, i, lambda x, y: x < y) & same_document(doc_start)
        logits.append(jnp.where(mask, s, -jnp.inf))
        values.append(f)
        whole = fibre_mask(length, dims, i, lambda x, y: True) & same_document(doc_start)
        a = softmax(s, whole)
        f = jnp.einsum("bhts,bshe->bthe", a, f, precision="highest")
    a = jax.nn.softmax(jnp.concatenate(logits, -1), axis=-1)
    parts = jnp.split(a, len(logits), -1)
    return sum(
        jnp.einsum("bhts,bshe->bthe", a, f, precision="highest")
        for a, f in zip(parts, values, strict=True)
    )


def check(operator, reference, args, wrt, tolerance=1e-5):
    """Value and gradients against the definition in float64."""
    do = jax.random.normal(jax.random.key(7), jax.eval_shape(operator, *args).shape)
    got = value_and_gradients(operator, args, wrt, do)
    with jax.enable_x64(True):
        *wide, do = (
            None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (*args, do)
        )
        assert_close(got, value_and_gradients(reference, wide, wrt, do), tolerance)


@pytest.mark.parametrize(
    "length, dims, order, positions, bias, packed",
    [
        (64, (8, 8), "slow_first", "digit", True, False),
        (61, (4, 4, 4), "slow_first", "digit", True, True),
        pytest.param(50, (8, None), "fast_first", "global", False, True, marks=pytest.mark.slow),
        pytest.param(61, (4, 1, 4, 2), "fast_first", "digit", True, True, marks=pytest.mark.slow),
        pytest.param(40, (4, 4), "slow_first", "global", True, True, marks=pytest.mark.slow),
    ],
)
def test_mixed_radix_equals_its_definition(length, dims, order, positions, bias, packed):
    q, k, v = inputs(length)
    frequencies = jnp.asarray(FREQUENCIES, jnp.float32)
    shape = (len(dims) - 1, H)
    self_bias = 4.0 + jax.random.normal(jax.random.key(3), shape) if bias else None
    doc_start = None
    if packed:
        doc_start = packed_starts(length)

    def operator(q, k, v, frequencies, self_bias):
        return tensorized_attention(
            q,
            k,
            v,
            dims=dims,
            order=order,
            positions=positions,
            frequencies=frequencies,
            self_bias=self_bias,
            doc_start=doc_start,
            backend="reference" if packed else "auto",
        )

    whole = tuple(n or length for n in dims)
    reference = functools.partial(
        mixed_radix, dims=whole, order=order, positions=positions, doc_start=doc_start
    )
    wrt = (0, 1, 2, 3, 4) if bias else (0, 1, 2, 3)
    check(operator, reference, (q, k, v, frequencies, self_bias), wrt)


@pytest.mark.slow
@pytest.mark.parametrize("order, packed", [("slow_first", True), ("fast_first", False)])
def test_dominance_equals_its_definition(order, packed):
    dims, doc_start = (4, 2, 5), packed_starts(37) if packed else None

    def operator(*args):
        *qkv, frequencies = args
        return tensorized_attention(
            *qkv,
            dims=dims,
            variant="dominance",
            order=order,
            frequencies=frequencies,
            doc_start=doc_start,
            backend="reference",
        )

    args = (*inputs(37), jnp.asarray(FREQUENCIES, jnp.float32))
    reference = functools.partial(dominance, dims=dims, order=order, doc_start=doc_start)
    check(operator, reference, args, (0, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_hierarchical_equals_its_definition(packed):
    dims, doc_start = (4, 2, 5), packed_starts(40) if packed else None

    def operator(*args):
        *qkv, frequencies = args
        return tensorized_attention(
            *qkv,
            dims=dims,
            variant="hierarchical",
            frequencies=frequencies,
            doc_start=None if doc_start is None else doc_start[:, : qkv[0].shape[1]],
            backend="reference",
        )

    args = (*inputs(40), jnp.asarray(FREQUENCIES, jnp.float32))
    check(
        operator, functools.partial(hierarchical, dims=dims, doc_start=doc_start), args, (0, 1, 2)
    )
    ragged = [x[:, :37] for x in args[:3]]
    run = jax.jit(operator)
    assert_close(run(*ragged, args[3]), run(*args)[:, :37], 1e-6)


def composed(length, dims, **options):
    """The matrix [B, H, T, T] that takes values to outputs, in float64."""
    with jax.enable_x64(True):
        q, k, _ = (x.astype(jnp.float64) for x in inputs(length, heads=2, kv_heads=2))
        v = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, 2, length))
        run = functools.partial(tensorized_attention, dims=dims, backend="reference", **options)
        return np.swapaxes(np.asarray(jax.jit(run)(q, k, v)), 1, 2)


@pytest.mark.parametrize(
    "length, dims, order",
    [
        (64, (8, 8), "fast_first"),
        (64, (4, 4, 4), "slow_first"),
        (27, (6, 5), "fast_first"),
        (40, (4, None), "slow_first"),
    ],
)
def test_mixed_radix_reaches_all_of_the_past_by_one_path(length, dims, order):
    past = np.tril(np.ones((length, length), bool))
    a = composed(length, dims, order=order)
    assert (a[..., ~past] == 0).all() and (a[..., past] > 0).all()
    np.testing.assert_allclose(a.sum(-1), 1.0, rtol=1e-12)
    sizes = tuple(n or length for n in dims)
    hops = [
        np.asarray(hop_mask(length, s, n))[0, 0].astype(int)
        for s, n in zip(strides(sizes), sizes, strict=True)
    ]
    paths = functools.reduce(np.matmul, hops)
    np.testing.assert_array_equal(paths, past)


def test_beyond_the_product_the_receptive_field_is_the_product():
    a = composed(40, (4, 4))
    distance = np.arange(40)[:, None] - np.arange(40)
    np.testing.assert_array_equal((a > 0).all((0, 1)), (distance >= 0) & (distance < 16))


def test_hierarchical_is_complete_and_dominance_is_not():
    past = np.tril(np.ones((64, 64), bool))
    whole = composed(64, (8, 8), variant="hierarchical")
    assert (whole[..., ~past] == 0).all() and (whole[..., past] > 0).all()
    part = composed(64, (8, 8), variant="dominance")
    dominated = np.array(
        [
            [all(b <= a for a, b in zip(digits(t, (8, 8)), digits(s, (8, 8)), strict=True))]
            for t in range(64)
            for s in range(64)
        ]
    ).reshape(64, 64)
    np.testing.assert_array_equal((part > 0).all((0, 1)), dominated)
    assert not dominated[8, 7]  # the token just before a block, from its first token


@pytest.mark.parametrize("variant", ["mixed_radix", "hierarchical"])
@pytest.mark.parametrize("dims", [(64,), (16, 4)])
def test_equals_dense_on_the_first_block(variant, dims):
    """One dimension is dense attention; the first n_1 tokens always are."""
    q, k, v = inputs(64)
    bias = {}
    if variant == "mixed_radix" and len(dims) > 1:
        bias = {"self_bias": jnp.full((1, H), 4.0)}
    run = functools.partial(
        tensorized_attention, dims=dims, variant=variant, backend="reference", **bias
    )
    got = jax.jit(run)(q, k, v)
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    want = masked_attention(q, k, v, np.tril(np.ones((64, 64), bool)))
    assert_close(got[:, : dims[0]], want[:, : dims[0]], 2e-6)
    if len(dims) > 1:
        assert np.abs(got[:, dims[0] :] - want[:, dims[0] :]).max() > 1e-2


def test_kronecker_identity():
    dims, length = (4, 2, 3), 24
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in inputs(length))
        got = tensorized_attention(q, k, v, dims=dims, variant="kronecker", causal=False)
        k, v = (np.repeat(np.asarray(x), H // K, axis=2) for x in (k, v))
        matrices = []
        for stride, size in zip(strides(dims), dims, strict=True):
            t = np.arange(length)
            digit, rest = t // stride % size, t - t // stride % size * stride
            logits = np.einsum("bthd,bshd->bhts", np.asarray(q), k)
            logits = logits * (rest[:, None] == rest) / np.sqrt(D * length / size)
            place = np.eye(size)[digit]
            s = np.einsum("bhts,tn,sm->bhnm", logits, place, place)
            matrices.append(np.asarray(jax.nn.softmax(s, axis=-1)))
        for b in range(B):
            for h in range(H):
                whole = functools.reduce(np.kron, [a[b, h] for a in reversed(matrices)])
                np.testing.assert_allclose(got[b, :, h], whole @ v[b, :, h], rtol=1e-10)


@pytest.mark.parametrize("variant", ["mixed_radix", "hierarchical", "dominance"])
def test_leaks_no_future(variant):
    """Every later query, key and value changes; no earlier output may."""
    length, cut = 60, 41
    run = jax.jit(
        functools.partial(tensorized_attention, dims=(8, 8), variant=variant, backend="reference")
    )
    args, others = inputs(length), inputs(length, seed=9)
    mixed = [x.at[:, cut:].set(y[:, cut:]) for x, y in zip(args, others, strict=True)]
    before, after = run(*args), run(*mixed)
    np.testing.assert_allclose(before[:, :cut], after[:, :cut], atol=1e-6)
    assert not np.allclose(before[:, cut:], after[:, cut:], atol=1e-2)


@pytest.mark.parametrize("variant", ["hierarchical", "dominance"])
def test_packed_documents_do_not_see_each_other(variant):
    """A change of the first document changes nothing of the second, and the other way round."""
    args, others = inputs(60), inputs(60, seed=9)
    doc_start = jnp.broadcast_to(jnp.where(jnp.arange(60) < 19, 0, 19)[None], (B, 60))
    options = dict(dims=(8, 8), variant=variant, doc_start=doc_start, backend="reference")
    run = jax.jit(functools.partial(tensorized_attention, **options))
    o = run(*args)
    for changed, kept in ((slice(0, 19), slice(19, 60)), (slice(19, 60), slice(0, 19))):
        mixed = [x.at[:, changed].set(y[:, changed]) for x, y in zip(args, others, strict=True)]
        after = run(*mixed)
        np.testing.assert_allclose(after[:, kept], o[:, kept], atol=1e-6)
        assert not np.allclose(after[:, changed], o[:, changed], atol=1e-2)


def test_packing_equals_separate_runs():
    q, k, v = inputs(45)
    bias = jnp.full((1, H), 2.0)
    frequencies = jnp.asarray(FREQUENCIES, jnp.float32)
    run = jax.jit(
        functools.partial(
            tensorized_attention,
            dims=(4, 8),
            self_bias=bias,
            frequencies=frequencies,
            backend="reference",
        )
    )
    doc_start = jnp.broadcast_to(jnp.where(jnp.arange(45) < 19, 0, 19)[None], (B, 45))
    packed = run(q, k, v, doc_start=doc_start)
    assert_close(packed[:, 19:], run(q[:, 19:], k[:, 19:], v[:, 19:]), 2e-6)
    assert_close(packed[:, :19], run(q[:, :19], k[:, :19], v[:, :19]), 2e-6)


def test_backward_keeps_only_inputs_values_and_one_number_a_row():
    """What `tensorized_attention` says it saves, for each of two hops; nothing is computed."""
    length, args = 96, inputs(96)
    bias = jnp.full((1, H), 2.0)
    run = functools.partial(tensorized_attention, dims=(16, 8), self_bias=bias)
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args))
    rows = B * length
    per_hop = rows * (H * D + K * D + H)  # q, k, lse
    values = rows * (K * E + H * E + H * E + H * E)  # of both hops, in and out
    assert sum(x.size for x in kept) <= 2 * per_hop + values + 64


def test_bfloat16():
    args = inputs(96)
    bias = jnp.full((1, H), 2.0)
    run = jax.jit(functools.partial(tensorized_attention, dims=(16, 8), self_bias=bias))
    short = [x.astype(jnp.bfloat16) for x in args]
    exact = run(*(x.astype(jnp.float32) for x in short))
    got = run(*short)
    assert got.dtype == jnp.bfloat16
    assert_close(got, exact, 0.006)


@pytest.mark.parametrize(
    "change",
    [
        dict(dims=()),
        dict(dims=8),
        dict(dims=(8.0, 8)),
        dict(dims=("8", 8)),
        dict(dims=(0, 8)),
        dict(dims=(None, 8)),
        dict(variant="diagonal"),
        dict(order="fast"),
        dict(positions="local"),
        dict(variant="dominance", order="fast"),
        dict(variant="dominance", positions="local"),
        dict(variant="hierarchical", positions="local"),
        dict(variant="kronecker", causal=False, positions="local"),
        dict(causal=False),
        dict(variant="kronecker"),
        dict(variant="hierarchical", order="slow_first"),
        dict(variant="dominance", self_bias=jnp.zeros((1, H))),
        dict(variant="dominance", dims=(4, 4)),
        dict(variant="kronecker", causal=False, doc_start=jnp.zeros((B, 64), jnp.int32)),
        dict(self_bias=jnp.zeros((2, H))),
        dict(doc_start=jnp.zeros((B, 1), jnp.int32)),
        dict(doc_start=jnp.zeros((B, 64))),
    ],
)
def test_refuses(change):
    name = "causal" if change.get("variant") == "kronecker" and len(change) == 1 else [*change][-1]
    with pytest.raises(ValueError, match=f"{name}|exceeds 16"):
        tensorized_attention(*inputs(64), **(dict(dims=(8, 8)) | change))


Q_SHAPE, K_SHAPE, V_SHAPE = (B, 64, H, D), (B, 64, K, D), (B, 64, K, E)


@pytest.mark.parametrize("variant", ["mixed_radix", "dominance", "hierarchical", "kronecker"])
@pytest.mark.parametrize(
    "shapes, rule",
    [
        ((Q_SHAPE[1:], K_SHAPE, V_SHAPE), "q, k and v must be"),
        ((Q_SHAPE, (B, 32, K, D), V_SHAPE), "q, k and v must be"),
        ((Q_SHAPE, (B, 64, K, 2 * D), V_SHAPE), "q, k and v must be"),
        ((Q_SHAPE, K_SHAPE, (B, 64, H, E)), "q, k and v must be"),
        ((Q_SHAPE, (B, 64, 3, D), (B, 64, 3, E)), "must be a multiple of K"),
        (((B, 0, H, D), (B, 0, K, D), (B, 0, K, E)), "no axis may be empty"),
    ],
)
def test_refuses_shapes(variant, shapes, rule):
    with pytest.raises(ValueError, match=rule):
        tensorized_attention(
            *map(jnp.zeros, shapes), dims=(8, 8), variant=variant, causal=variant != "kronecker"
        )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_doc_start_may_be_narrow_or_unsigned(dtype):
    doc_start = jnp.broadcast_to(jnp.where(jnp.arange(150) < 19, 0, 19)[None], (B, 150))
    for variant in ("mixed_radix", "hierarchical"):
        run = functools.partial(
            tensorized_attention, *inputs(150), dims=(8, 20), variant=variant, backend="reference"
        )
        got = run(doc_start=doc_start.astype(dtype))
        np.testing.assert_array_equal(got, run(doc_start=doc_start))


def test_cached_scores_are_not_rounded():
    """One dimension is dense attention; one token must come as near to it as the full pass."""
    length = 256
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 2, 64)) for key in keys)
    q, k, v = (x.astype(jnp.bfloat16) for x in (3 * q, 3 * k, v))
    want = masked_attention(q, k, v, np.tril(np.ones((length, length), bool)))
    full = tensorized_attention(q, k, v, dims=(length,))
    hops = make_hops((length,), length, "slow_first", "digit", 1 / 8, "auto")
    memory = (jnp.broadcast_to(x, (length, *x.shape[1:])) for x in (k, v))
    start, new = jnp.arange(length), jnp.ones(length, jnp.int32)  # every token in a row of its own
    cached, _ = tensorized_cache_attention(q.swapaxes(0, 1), *memory, (), start, new, hops=hops)
    assert relative_error(cached.swapaxes(0, 1), want) < 1.3 * relative_error(full, want)


def test_delta_is_of_the_cotangent_as_rounded(monkeypatch):
    """A program that makes do itself must not sum what do was before its rounding."""
    q, k, v = inputs(64, kv_heads=H)
    o, do = (jax.random.normal(jax.random.key(i), v.shape) for i in (3, 4))
    bias = jnp.zeros(H)
    own = operator_module.self_scores(q, k, bias, 1.0)
    nothing = tuple(map(jnp.zeros_like, (q, k, v)))
    monkeypatch.setattr(operator_module, "block_backward", lambda *_, **__: nothing)

    @jax.jit
    def dbias(do):
        saved = (q, k, v, bias, None, None, o, own)
        return operator_module._attend_bwd(Hop(1, None), saved, do.astype(jnp.bfloat16))[3]

    rounded = np.asarray(do.astype(jnp.bfloat16), np.float64)
    want = (rounded * (np.asarray(v, np.float64) - np.asarray(o))).sum((0, 1, 3))
    np.testing.assert_allclose(dbias(do), want, atol=1e-4)
    # XLA on a CPU rounds anyway: that both sums ask for it shows in the program alone.
    assert str(jax.make_jaxpr(dbias)(do)).count("reduce_precision") == 2
