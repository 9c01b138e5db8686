import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.compiler import training_options
from longctx.parallel import Layout, context, context_attention, make_mesh, shards
from pallas_kernels.flash_attention import flash_attention
from tests.harness import assert_close
from tests.longctx.parallel.cases import (
    QUICK_COMPILE,
    documents,
    draw,
    errors,
    on_mesh,
    value_and_gradients,
)


@pytest.fixture(scope="module", autouse=True)
def early_rows_wait():
    """However few they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "HIDING", 0)
        yield


# Time axes of q, k, v, then of o, lse, dq, dk, dv.
TIME = (1, 1, 1, 1, 2, 1, 1, 1)


def operands(*, batch=1, length=32, heads=4, kv_heads=2, value_width=12, dtype=jnp.float32):
    """q, k, v and the cotangents of o and lse; D = 8."""
    kinds = (heads, 8), (kv_heads, 8), (kv_heads, value_width), (heads, value_width)
    shapes = [(batch, length, *kind) for kind in kinds]
    *qkv, do, dlse = draw([*shapes, (batch, heads, length)], dtype)
    return tuple(qkv), (do, dlse.astype(jnp.float32))


def single(args, cotangents):
    attend = functools.partial(flash_attention, return_lse=True, backend="reference")
    return value_and_gradients(attend, args, cotangents)


def exact(
    args, cotangents, *, causal=True, window=None, doc_start=None, scale=8**-0.5, soft_cap=None
):
    """o, lse, dq, dk, dv in float64 numpy, from the operands as they were rounded."""
    (q, k, v), (do, dlse) = jax.tree.map(lambda x: np.asarray(x, np.float64), (args, cotangents))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    key, row = np.arange(k.shape[1]), np.arange(q.shape[1])[:, None]
    seen = (key <= row if causal else key >= 0) & (key > row - (window or np.inf))
    first = np.zeros((1, 1)) if doc_start is None else doc_start
    seen = (seen & (key >= first[..., None]))[:, None]
    s, slope = scale * np.einsum("bthd,bshd->bhts", q, k), scale
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
        slope = scale * (1 - (s / soft_cap) ** 2)
    s = np.where(seen, s, -np.inf)
    lse = np.log(np.exp(s).sum(-1))
    p = np.exp(s - lse[..., None])
    o = np.einsum("bhts,bshe->bthe", p, v)
    delta = np.einsum("bthe,bthe->bht", do, o) - dlse
    ds = p * slope * (np.einsum("bthe,bshe->bhts", do, v) - delta[..., None])
    dk, dv = np.einsum("bhts,bthd->bshd", ds, q), np.einsum("bhts,bthe->bshe", p, do)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    return [o, lse, np.einsum("bhts,bshd->bthd", ds, k), dk, dv]


def sharded(
    args, cotangents, layout, devices, *,
    doc_start=None, mesh=None, compiler_options=QUICK_COMPILE, **options,
):  # fmt: skip
    start = None if doc_start is None else jnp.asarray(layout.apply(doc_start))
    attend = functools.partial(
        context_attention, layout=layout, doc_start=start, return_lse=True, **options
    )
    on = functools.partial(on_mesh, compiler_options=compiler_options, **(mesh or {}))
    return on(attend, args, cotangents, layout, devices, TIME)


CASES = {
    "ring, zigzag": ("ring", Layout("zigzag", 4), {}),
    "ring, zigzag, packed, window": ("ring", Layout("zigzag", 4), {"window": 9, "cuts": 3}),
    "ring, contiguous, window": ("ring", Layout("contiguous", 4), {"window": 10}),
    "ring, striped, packed": ("ring", Layout("striped", 4), {"cuts": 2}),
    "ring, head groups, packed": ("ring", Layout("zigzag", 4), {"head_groups": 2, "cuts": 2}),
    "ring, not causal": ("ring", Layout("zigzag", 4), {"causal": False}),
    "ring, layout of fewer ranks": ("ring", Layout("zigzag", 2), {}),
    "all_gather, zigzag, packed": ("all_gather", Layout("zigzag", 4), {"cuts": 3}),
    "all_gather, striped, window": ("all_gather", Layout("striped", 4), {"window": 9}),
    "all_gather, not causal": ("all_gather", Layout("contiguous", 4), {"causal": False}),
    "ulysses, packed, window": ("ulysses", Layout("contiguous", 4), {"window": 9, "cuts": 3}),
    "usp, zigzag, packed": ("usp", Layout("zigzag", 2), {"cuts": 3}),
    "usp, contiguous, window": ("usp", Layout("contiguous", 2), {"window": 9}),
    "auto": ("auto", Layout("zigzag", 4), {}),
}


# Much like others, and found again by the slow property test.
SLOW = (
    "ring, not causal",
    "ring, layout of fewer ranks",
    "all_gather, striped, window",
    "all_gather, not causal",
    "usp, contiguous, window",
    "auto",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_four_devices_equal_one(name):
    strategy, layout, options = CASES[name]
    options = dict(options)
    cuts, groups = options.pop("cuts", 0), options.pop("head_groups", 1)
    options["doc_start"] = documents(1, 32, cuts) if cuts else None
    args, cotangents = operands()
    want = exact(args, cotangents, **options)
    options |= {"strategy": strategy, "head_groups": groups}
    got = sharded(args, cotangents, layout, 4, backend="reference", **options)
    assert max(errors(got, want)) < 5e-7


def test_no_row_waits_where_the_others_would_not_hide_the_first_move(monkeypatch):
    monkeypatch.setattr(shards, "HIDING", 7)  # four of 8 rows see 6 keys, with two query heads each
    args, cotangents = operands()
    got = sharded(args, cotangents, Layout("zigzag", 4), 4, backend="reference", strategy="ring")
    assert max(errors(got, exact(args, cotangents))) < 5e-7


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two NVIDIA GPUs"
)
@pytest.mark.parametrize(("kind", "cuts"), [("zigzag", 0), ("contiguous", 3)])
def test_two_gpus_equal_one(kind, cuts):
    """With the options of training, by which GPUs move arrays from memory to memory."""
    *args, do = draw([(1, 4096, h, 128) for h in (8, 2, 2, 8)], jnp.bfloat16)
    doc_start = documents(1, 4096, cuts) if cuts else None
    alone = functools.partial(flash_attention, lo=doc_start, return_lse=True)
    cotangents = do, jnp.ones((1, 8, 4096))
    wanted = value_and_gradients(alone, args, cotangents)
    with jax.set_mesh(make_mesh(seq=2)):
        how = {"strategy": "ring", "doc_start": doc_start, "compiler_options": training_options()}
    got = sharded(args, cotangents, Layout(kind, 2), 2, **how)
    assert_close(got, wanted, 5e-3)


def test_production_blocks_heads_on_tensor_batch_on_data():
    args, cotangents = operands(batch=2)
    options = {"soft_cap": 5.0, "scale": 0.3}
    got = sharded(
        args, cotangents, Layout("zigzag", 2), 2, strategy="ring", mesh={"data": 2, "tensor": 2},
        **options,
    )  # fmt: skip
    assert_close(got, exact(args, cotangents, **options), 1e-6)


@pytest.mark.parametrize(
    ("devices", "length", "kv_heads", "head_groups"), [(2, 10, 1, 1), (4, 4, 4, 1), (2, 8, 4, 4)]
)
def test_stacked_messages_and_halves_of_the_keys(devices, length, kv_heads, head_groups):
    """Keys as wide as values; five of each device's own, cut into halves, and one, which is not."""
    args, cotangents = operands(batch=2, length=length, kv_heads=kv_heads, value_width=8)
    start = documents(2, length, 2)
    got = sharded(
        args, cotangents, Layout("contiguous", devices), devices, doc_start=start,
        strategy="ring", backend="reference", head_groups=head_groups,
    )  # fmt: skip
    assert max(errors(got, exact(args, cotangents, doc_start=start))) < 5e-7


@pytest.mark.parametrize("kv_heads", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_ulysses_replicates_key_heads(kv_heads):
    args, cotangents = operands(heads=12, kv_heads=kv_heads)
    got = sharded(
        args, cotangents, Layout("contiguous", 4), 4, strategy="ulysses", backend="reference"
    )
    assert_close(got, exact(args, cotangents), 5e-7)


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [
        ("ring", 2),
        ("ring", 8),
        ("all_gather", 8),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ring", 4), ("all_gather", 2))),
    ],
)
def test_bfloat16_error_is_that_of_one_device(strategy, devices):
    check_error(strategy, devices)


def test_bfloat16_in_stacked_messages():
    """With enough devices that sums are added up inside a message."""
    check_error("ring", 8, value_width=8)


@pytest.mark.parametrize(
    ("strategy", "layout", "tensor"),
    [
        ("ulysses", Layout("contiguous", 4), 1),
        ("usp", Layout("zigzag", 2), 1),
        ("ring", Layout("zigzag", 2), 4),
        *(
            pytest.param(name, layout, 4, marks=pytest.mark.slow)
            for name, layout in (("all_gather", Layout("zigzag", 2)), ("ulysses", Layout()))
        ),
        pytest.param("auto", Layout(), 8, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_in_copies_of_key_heads(strategy, layout, tensor):
    """Whose gradients are summed before they are rounded."""
    devices = {1: 4, 4: 2, 8: 1}[tensor]
    check_error(strategy, devices, layout, {"tensor": tensor}, heads=8, kv_heads=1)


def check_error(strategy, devices, layout=None, mesh=None, **shape):
    """Against float64, the error on many devices is at most 1.1 times that on one."""
    args, cotangents = operands(length=64, dtype=jnp.bfloat16, **shape)
    want = exact(args, cotangents)
    one = errors(single(args, cotangents), want)
    layout = layout or Layout("zigzag", devices)
    options = {"strategy": strategy, "backend": "reference", "mesh": mesh}
    got = sharded(args, cotangents, layout, devices, **options)
    for name, many, single_device in zip(
        ("o", "lse", "dq", "dk", "dv"), errors(got, want), one, strict=True
    ):
        assert many <= 1.1 * single_device + 1e-6, name


@pytest.mark.slow
def test_sixteen_devices():
    """In a process of its own, since all tests of this one have eight."""
    program = [sys.executable, "-m", "tests.longctx.parallel.sixteen"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "16"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


@st.composite
def calls(draw, most_devices):
    devices = draw(st.sampled_from([n for n in (2, 4, 8) if n <= most_devices]))
    strategy = draw(st.sampled_from(["ring", "all_gather", "ulysses", "usp"]))
    ranks = {"ulysses": 1, "usp": devices // 2}.get(strategy, devices)
    kind = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = draw(st.sampled_from([8, 16]))
    window = draw(st.none() | st.integers(1, 40))
    return devices, strategy, Layout(kind, ranks), heads, kv_heads, window, draw(st.integers(0, 4))


def check(call):
    devices, strategy, layout, heads, kv_heads, window, cuts = call
    if strategy == "usp" and devices == 2:
        strategy, layout = "ring", Layout(layout.kind, 2)
    args, cotangents = operands(heads=heads, kv_heads=kv_heads)
    options = {"window": window, "doc_start": documents(1, 32, cuts) if cuts else None}
    got = sharded(
        args, cotangents, layout, devices, strategy=strategy, backend="reference", **options
    )
    assert_close(got, exact(args, cotangents, **options), 1e-6)


@settings(deadline=None, max_examples=2, derandomize=True)
@given(calls(most_devices=4))
def test_any_call(call):
    check(call)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(calls(most_devices=8))
def test_any_call_many(call):
    check(call)


def compiled_text(length, devices, **options):
    """HLO of a forward and backward on global arrays."""
    mesh = make_mesh(seq=devices)
    place = NamedSharding(mesh, P(None, "seq"))
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32, sharding=place)

    def loss(q, k, v):
        return jnp.sum(context_attention(q, k, v, backend="reference", **options))

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().as_text()


def test_a_ring_moves_only_what_it_needs():
    def permutes(**options):
        text = compiled_text(64, 8, strategy="ring", **options)
        assert not re.findall(r" (all-gather|all-to-all|all-reduce|reduce-scatter)\(", text)
        return len(re.findall(r" collective-permute\(", text))

    # Keys and values in the forward and the backward; gradients once less, and once home.
    assert permutes(layout="contiguous", window=1) == 0
    assert permutes(layout="contiguous", window=9) == 2 * 2 * 1 + 1
    assert permutes(layout="contiguous", window=10) == 2 * 2 * 2 + 2


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.slow), False])
def test_inside_a_users_own_shard_map(check_vma):
    args, _ = operands()
    layout = Layout("zigzag", 4)
    rows = P(None, "time")

    def loss(q, k, v):
        attend = functools.partial(context_attention, layout=layout, axis="time", strategy="ring")
        local = functools.partial(attend, backend="reference")
        o = jax.shard_map(local, in_specs=(rows,) * 3, out_specs=rows, check_vma=check_vma)(q, k, v)
        return jnp.sum(jnp.sin(o))

    def one(q, k, v):
        return jnp.sum(jnp.sin(flash_attention(q, k, v, backend="reference")))

    want = jax.jit(jax.grad(one, (0, 1, 2)))(*args)
    with jax.set_mesh(jax.make_mesh((4,), ("time",), (AxisType.Auto,))):
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(layout.apply, args))
    assert_close([layout.invert(g) for g in got], want, 1e-6)


@pytest.mark.parametrize("strategy", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize("manual", [{"seq"}, {"data", "seq"}])
def test_gradients_inside_a_users_shard_map_over_some_axes(strategy, manual):
    args, _ = operands(batch=2)
    layout, rows = Layout("zigzag", 4), P("data" if "data" in manual else None, "seq")

    def loss(*args):
        attend = functools.partial(context_attention, layout=layout, strategy=strategy)
        o = jax.shard_map(attend, in_specs=(rows,) * 3, out_specs=rows, axis_names=manual)(*args)
        return jnp.sum(jnp.sin(o))

    one = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(flash_attention(*x))), (0, 1, 2)))
    with jax.set_mesh(make_mesh(data=2, seq=4)):
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(layout.apply, args))
    assert_close([layout.invert(g) for g in got], one(*args), 1e-6)


def test_auto_is_told_the_rows_of_one_device(monkeypatch):
    told = []
    explain = context.cost.explain
    monkeypatch.setattr(
        context.cost, "explain", lambda **call: told.append(call["batch"]) or explain(**call)
    )
    args, _ = operands(batch=4)
    with jax.set_mesh(make_mesh(data=4, seq=2)):
        jax.eval_shape(context_attention, *args)
    assert told == [1]


def test_explicit_mesh_and_one_device():
    args, _ = operands()
    want = flash_attention(*args, backend="reference")
    attend = functools.partial(context_attention, backend="reference")
    assert_close(attend(*args), want, 0)
    with jax.set_mesh(make_mesh(data=2)):
        assert_close(jax.jit(attend)(*(jnp.repeat(x, 2, 0) for x in args))[:1], want, 1e-7)
    mesh = make_mesh(seq=2, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, NamedSharding(mesh, P(None, "seq")))
        out = jax.jit(attend)(*placed)
    assert jax.typeof(out).sharding.spec[1] in ("seq", ("seq",))
    assert_close(out, want, 1e-6)


def test_errors_come_before_any_collective():
    (q, k, v), _ = operands(length=32, heads=6, kv_heads=3)
    start = jnp.zeros((1, 32), jnp.int32)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
        for message, options in {
            "strategy='rings'": {"strategy": "rings"},
            "axis='time' is not an axis": {"axis": "time"},
            "must be a multiple of 8": {"layout": "zigzag", "cut": 28},
            "length=30": {"cut": 30},
            "needs devices=4 to be a multiple": {"layout": Layout("zigzag", 3)},
            "position order": {"strategy": "ulysses", "layout": "zigzag", "head_axis": None},
            "fewer than 4 ranks": {"strategy": "usp", "head_axis": None},
            "must be a multiple of 12": {"strategy": "ulysses", "head_axis": None},
            "the 2 devices along head_axis='tensor'": {"heads": 3},
            "head_groups=2 must be 1": {"head_groups": 2, "strategy": "all_gather"},
            "head_groups=2 must divide the 3 key heads": {
                "head_groups": 2,
                "strategy": "ring",
                "head_axis": None,
            },
            "need causal=True": {"causal": False, "doc_start": start},
        }.items():
            options = dict(options)
            cut, heads = options.pop("cut", 32), options.pop("heads", 6)
            with pytest.raises(ValueError, match=re.escape(message)):
                jax.eval_shape(
                    functools.partial(context_attention, **options),
                    *(x[:, :cut, :heads] for x in (q, k, v)),
                )
        for message, call in {
            "[B, T, H, D]": lambda: context_attention(q, k[:, :16], v),
            "equally wide": lambda: context_attention(q, k[..., :4], v),
            "doc_start must be": lambda: context_attention(q, k, v, doc_start=start[:, :16]),
            "doc_start must be integer": lambda: context_attention(q, k, v, doc_start=start * 1.0),
            "window=0": lambda: context_attention(q, k, v, window=0),
            "window=4.0 must be a Python Integral": lambda: context_attention(q, k, v, window=4.0),
            "soft_cap=-1": lambda: context_attention(q, k, v, soft_cap=-1),
            "backend='foo' must be one of": lambda: context_attention(q, k, v, backend="foo"),
            "one floating dtype": lambda: context_attention(q, k, v.astype(jnp.bfloat16)),
            "[B, T, K, E]": lambda: context_attention(q, k, v[..., 0]),
            "1 of an array's shape (1, 32, 6, 8) must be a multiple of the 2 devices along": (
                lambda: context_attention(q, k, v, batch_axes=("tensor",), head_axis=None)
            ),
        }.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                call()


def test_errors_inside_a_users_shard_map_come_before_any_collective():
    (q, k, v), _ = operands(length=28)
    rows = P(None, "time")

    def attend(**options):
        local = functools.partial(context_attention, strategy="ring", **options)
        return jax.shard_map(local, in_specs=(rows,) * 3, out_specs=rows)(q, k, v)

    with jax.set_mesh(jax.make_mesh((4,), ("time",), (AxisType.Auto,))):
        with pytest.raises(ValueError, match="axis='seq' is not an axis"):
            attend()
        with pytest.raises(ValueError, match="length=28 must be a multiple of 8"):
            attend(axis="time", layout="zigzag")
