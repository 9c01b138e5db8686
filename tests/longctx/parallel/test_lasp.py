import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.nn.stack import REMAT_POLICIES
from longctx.parallel import Layout, context_lightning, lasp, make_mesh
from pallas_kernels.lightning_attention import lightning_attention
from tests.harness import assert_close
from tests.longctx.parallel.cases import documents, draw, errors, on_mesh, value_and_gradients

# Time axes of q, k, v, log_decay, then of o, dq, dk, dv, dlog_decay.
TIME = (1, 1, 1, None, 1, 1, 1, 1, None)
H, D, E = 4, 8, 12


def operands(*, batch=1, length=32, dtype=jnp.float32):
    *qkv, do = draw([(batch, length, H, w) for w in (D, D, E, E)], dtype)
    log_decay = jnp.asarray([0.0, -0.01, -0.2, -3.0])
    return (*qkv, log_decay), do


def exact(args, do, doc_start=None):
    """o, dq, dk, dv, dlog_decay in float64 numpy, token pair by token pair."""
    q, k, v, rate, do = (np.asarray(x, np.float64) for x in (*args, do))
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    seen = np.broadcast_to(distance >= 0, (q.shape[0], *distance.shape))
    if doc_start is not None:
        seen = seen & (np.arange(q.shape[1]) >= doc_start[..., None])
    distance = np.maximum(distance, 0)
    weight = seen[:, None] * np.exp(rate[:, None, None] * distance)
    p = weight * np.einsum("bthd,bshd->bhts", q, k)
    dp = np.einsum("bthe,bshe->bhts", do, v)
    ds = weight * dp
    return [
        np.einsum("bhts,bshe->bthe", p, v),
        np.einsum("bhts,bshd->bthd", ds, k),
        np.einsum("bhts,bthd->bshd", ds, q),
        np.einsum("bhts,bthe->bshe", p, do),
        np.einsum("bhts,bhts,ts->h", p, dp, distance),
    ]


def sharded(args, do, layout, devices, *, doc_start=None, mesh=None, **options):
    start = None if doc_start is None else jnp.asarray(layout.apply(doc_start))
    attend = functools.partial(context_lightning, layout=layout, doc_start=start, **options)
    return on_mesh(attend, args, do, layout, devices, TIME, **(mesh or {}))


@pytest.mark.parametrize(
    ("strategy", "layout", "cuts", "mesh"),
    [
        ("all_gather", Layout("contiguous", 4), 0, {}),
        ("all_gather", Layout("zigzag", 4), 4, {}),
        pytest.param("all_gather", Layout("zigzag", 2), 2, {}, marks=pytest.mark.slow),
        ("ring", Layout("zigzag", 4), 3, {}),
        ("ring", Layout("contiguous", 2), 0, {"data": 2, "tensor": 2}),
    ],
)
def test_many_devices_equal_one(strategy, layout, cuts, mesh):
    devices = 2 if mesh else 4
    args, do = operands(batch=2)
    doc_start = documents(2, 32, cuts) if cuts else None
    got = sharded(args, do, layout, devices, strategy=strategy, doc_start=doc_start, mesh=mesh)
    assert_close(got, exact(args, do, doc_start), 1e-6)


@pytest.mark.parametrize(
    ("strategy", "layout", "cuts"),
    [
        ("all_gather", Layout("zigzag", 4), 4),
        ("ring", Layout("contiguous", 4), 0),
    ],
)
def test_pieces_change_nothing(strategy, layout, cuts, monkeypatch):
    monkeypatch.setattr(lasp, "lightning_pieces", lambda *_, **__: 4)
    args, do = operands(batch=2, length=64)
    doc_start = documents(2, 64, cuts) if cuts else None
    got = sharded(args, do, layout, 4, strategy=strategy, doc_start=doc_start)
    assert_close(got, exact(args, do, doc_start), 1e-6)


@pytest.mark.parametrize("manual", [{"seq"}, {"data", "seq"}])
def test_gradients_inside_a_users_shard_map_over_some_axes(manual):
    (q, k, v, log_decay), do = operands(batch=2)
    layout, rows = Layout("zigzag", 4), P("data" if "data" in manual else None, "seq")

    def pull(q, k, v, do):
        def loss(q, k, v):
            o = jax.shard_map(
                lambda *x: context_lightning(*x, log_decay, layout=layout),
                in_specs=(rows,) * 3, out_specs=rows, axis_names=manual,
            )(q, k, v)  # fmt: skip
            return jnp.sum(o * do)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    want = jax.vjp(lambda q, k, v: lightning_attention(q, k, v, log_decay), q, k, v)[1](do)
    with jax.set_mesh(make_mesh(data=2, seq=4)):
        got = jax.jit(pull)(*map(layout.apply, (q, k, v, do)))
    assert_close([layout.invert(g) for g in got], want, 1e-6)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["contiguous", "zigzag"]),
    st.sampled_from(["all_gather", "ring"]),
    st.integers(0, 5),
    st.integers(0, 1000),
)
def test_any_documents(devices, kind, strategy, cuts, seed):
    args, do = operands(batch=2)
    doc_start = documents(2, 32, cuts, seed) if cuts else None
    got = sharded(args, do, Layout(kind, devices), devices, strategy=strategy, doc_start=doc_start)
    assert_close(got, exact(args, do, doc_start), 5e-6)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_bfloat16_error_is_that_of_one_device(devices):
    check_error(devices)


def check_error(devices):
    """Against float64, the error on many devices is at most 1.1 times that on one."""
    args, do = operands(length=64, dtype=jnp.bfloat16)
    want = exact(args, do)
    one = errors(value_and_gradients(lightning_attention, args, do), want)
    got = sharded(args, do, Layout("zigzag", devices), devices)
    for name, many, single in zip(
        ("o", "dq", "dk", "dv", "dlog_decay"), errors(got, want), one, strict=True
    ):
        assert many <= 1.1 * single + 1e-6, name


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two NVIDIA GPUs"
)
@pytest.mark.parametrize("cuts", [0, 3])
def test_two_gpus_equal_one(cuts):
    """At a length for which the kernels run in pieces."""
    *args, do = draw([(1, 8192, 8, 128)] * 4, jnp.bfloat16)
    args = (*args, jnp.asarray([0.0, *(-(0.5 ** np.arange(2, 9)))], jnp.float32))
    doc_start = documents(1, 8192, cuts) if cuts else None
    alone = functools.partial(lightning_attention, doc_start=doc_start)
    wanted = value_and_gradients(alone, args, do)
    got = sharded(args, do, Layout("zigzag", 2), 2, doc_start=doc_start)
    assert_close(got[:4], wanted[:4], 5e-3)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_communication_is_independent_of_length(strategy):
    def moved(length):
        mesh = make_mesh(seq=4)
        x = jax.ShapeDtypeStruct(
            (1, length, H, D), jnp.float32, sharding=NamedSharding(mesh, P(None, "seq"))
        )
        rate = jax.ShapeDtypeStruct((H,), jnp.float32)

        def loss(q, k, v, log_decay):
            options = {"strategy": strategy, "layout": "zigzag"}
            return jnp.sum(context_lightning(q, k, v, log_decay, **options))

        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, rate)
        text = lowered.compile().as_text()
        kinds = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
        return sorted(re.findall(rf"= (\S+) ({kinds})\(", text))

    state = rf"f32\[(4,|8,)?2?,?1,{H},{D},{D}\]"
    short = moved(64)
    assert short == moved(512)
    expected = {"all_gather": 2, "ring": 6}[strategy]  # forward and backward
    assert len(short) == expected
    assert all(re.match(state, shape) for shape, _ in short), short


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_states_are_not_exchanged_again(remat):
    args, _ = operands()

    def gradients(attend):
        def loss(*args):
            return jnp.sum(jnp.sin(attend(*args)))

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()

    attend = functools.partial(context_lightning, layout="zigzag")
    again = jax.checkpoint(attend, policy=REMAT_POLICIES[remat])
    with jax.set_mesh(make_mesh(seq=4)):
        plain, compiled, all_again = map(gradients, (attend, again, jax.checkpoint(attend)))
        assert_close(compiled(*args), plain(*args), 1e-6)
    counts = [x.as_text().count(" all-gather(") for x in (plain, compiled, all_again)]
    assert counts == [2, 2, 3]


def test_inside_a_users_own_shard_map():
    args, do = operands()
    rows = P(None, "time")

    def attend(*args):
        local = functools.partial(context_lightning, axis="time")
        specs = (rows, rows, rows, P())
        return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(*args)

    with jax.set_mesh(jax.make_mesh((4,), ("time",), (AxisType.Auto,))):
        got = value_and_gradients(attend, args, do)
    assert_close(got, exact(args, do), 1e-6)


def test_one_device_and_errors():
    (q, k, v, rate), _ = operands()
    assert_close(context_lightning(q, k, v, rate), lightning_attention(q, k, v, rate), 0)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
        with pytest.raises(ValueError, match="striped"):
            context_lightning(q, k, v, rate, layout="striped")
        with pytest.raises(ValueError, match="strategy='usp'"):
            context_lightning(q, k, v, rate, strategy="usp")
        with pytest.raises(ValueError, match="length=30"):
            context_lightning(q[:, :30], k[:, :30], v[:, :30], rate)
        with pytest.raises(ValueError, match="head_axis='tensor'"):
            context_lightning(q[:, :, :3], k[:, :, :3], v[:, :, :3], rate[:3])
        with pytest.raises(ValueError, match=re.escape("[B, T, H, D]")):
            context_lightning(q, k[:, :16], v, rate)
        with pytest.raises(ValueError, match="doc_start is int32"):
            context_lightning(q, k, v, rate, doc_start=jnp.zeros((1, 16), jnp.int32))
