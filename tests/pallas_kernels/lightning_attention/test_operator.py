"""Lightning attention on the machine at hand: the chunked form against the recurrence."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.lightning_attention import (
    alibi_log_decay,
    lightning_attention,
    lightning_state,
    lightning_step,
    printed_log_decay,
)
from pallas_kernels.lightning_attention.tiles import XlaTiles
from tests.harness import assert_close, check_op, pullback_of
from tests.pallas_kernels.lightning_attention.cases import (
    TOLERANCE,
    Case,
    attend,
    final_state,
    initial_cotangent,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")
few = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("length", [1, 15, 63, 500, 1000])
def test_packed_with_state(length, dtype):
    case = Case(length, dtype=dtype)
    check_op(
        attend("auto"),
        attend("reference"),
        (*case.draw(), case.documents()),
        wrt=range(5),
        tolerance=TOLERANCE[dtype],
    )


def test_gradients_of_the_definition_keep_few_of_its_states():
    case = Case(1024, batch=1, key_width=32, value_width=32)
    args = case.draw()
    out = jax.eval_shape(attend("reference"), *args)
    compiled = pullback_of(attend("reference"), range(5)).lower(args, out).compile()
    states = case.length * args[-1].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < states / 4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
def test_one_document_without_state(dtype):
    case = Case(200, key_width=5, value_width=3, dtype=dtype)
    check_op(
        attend("xla"),
        attend("reference"),
        case.draw()[:4],
        wrt=range(4),
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
def test_state_alone(dtype, packed):
    case = Case(130, dtype=dtype)
    check_op(
        final_state("auto"),
        final_state("reference"),
        (*case.draw()[1:], *([case.documents()] if packed else [])),
        wrt=range(4),
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
def test_cotangent_of_the_state_alone(dtype, packed):
    case = Case(130, dtype=dtype)
    q, k, do, log_decay, state = case.draw()
    documents = [case.documents()] if packed else []

    def outputs(state):
        return attend("reference")(q, k, do, log_decay, state, *documents)[0]

    wanted = jax.vjp(outputs, state)[1](do)[0]
    for backend in ("auto", "reference"):
        got = initial_cotangent(backend)(q, do, log_decay, *documents)
        assert_close(got, wanted, TOLERANCE[dtype])


def test_float64():
    with jax.enable_x64(True):
        q, k, v, log_decay, state = (np.asarray(x, np.float64) for x in Case(70).draw())
        documents = Case(70).documents()

        def everything(backend):
            o, pullback = jax.vjp(
                lambda *x: attend(backend)(*x, documents), q, k, v, log_decay, state
            )
            final, pullback_final = jax.vjp(
                lambda *x: final_state(backend)(*x, documents), k, v, log_decay, state
            )
            return o, pullback(jax.tree.map(jnp.cos, o)), final, pullback_final(jnp.cos(final))

        got = everything("xla")
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float64)}
        assert_close(got, everything("reference"), 1e-13)


def test_long_and_fast_decay_gradient():
    # Summed as t (q.dq - k.dk), this gradient would be lost to cancellation.
    case = Case(4000, batch=1, heads=2, key_width=4, value_width=4, dtype=jnp.bfloat16)
    q, k, v, _, _ = case.draw()
    args = (q, k, v, jnp.array([-3.0, -0.5]))
    check_op(attend("xla"), attend("reference"), args, wrt=(3,), tolerance=5e-3)


@few
@given(chunk=st.sampled_from([1, 7, 70, 80]), seed=st.integers(0, 99))
def test_chunk_size_changes_nothing(chunk, seed):
    case = Case(70)
    args = (*case.draw(seed), case.documents(seed, every=10))
    outs = [attend("xla", tiles=XlaTiles(chunk=size))(*args) for size in (chunk, 16)]
    assert_close(*outs, 1e-5)


@few
@given(split=st.sampled_from([1, 31, 69]), seed=st.integers(0, 99))
def test_two_halves_equal_one_pass(split, seed):
    case = Case(70)
    q, k, v, log_decay, state = case.draw(seed)
    documents = case.documents(seed, every=20)
    o, final = attend("auto")(q, k, v, log_decay, state, documents)
    outs = []
    for begin, end in ((0, split), (split, 70)):
        half = (x[:, begin:end] for x in (q, k, v))
        out, state = attend("auto")(*half, log_decay, state, documents[:, begin:end] - begin)
        outs.append(out)
    assert_close((jnp.concatenate(outs, 1), state), (o, final), 1e-5)


@few
@given(token=st.integers(0, 69), which=st.integers(0, 2))
def test_a_token_changes_nothing_earlier(token, which):
    case = Case(70)
    args = [np.asarray(x) for x in (*case.draw(), case.documents())]
    before, _ = attend("auto")(*args)
    args[which] = args[which].copy()
    args[which][:, token] += 1
    after, _ = attend("auto")(*args)
    np.testing.assert_array_equal(before[:, :token], after[:, :token])
    assert not np.array_equal(before[:, token], after[:, token])


@few
@example(lengths=[40, 23, 1, 6])  # the last document begins with a chunk
@given(lengths=st.permutations([1, 6, 23, 40]))
def test_packing_equals_separate_runs(lengths):
    q, k, v, log_decay, _ = Case(70, batch=1).draw()
    edges = np.cumsum([0, *lengths])
    starts = np.repeat(edges[:-1], lengths)[None].astype(np.int32)
    o, final = attend("auto")(q, k, v, log_decay, None, starts)
    for begin, end in itertools.pairwise(edges):
        alone, state = attend("auto")(*(x[:, begin:end] for x in (q, k, v)), log_decay)
        assert_close(o[:, begin:end], alone, 1e-5)
    assert_close(final, state, 1e-5)


def test_steps_continue_a_prefill():
    q, k, v, log_decay, state = Case(20).draw()
    wanted, final = attend("auto")(q, k, v, log_decay, state)
    _, state = attend("auto")(q[:, :13], k[:, :13], v[:, :13], log_decay, state)
    for t in range(13, 20):
        o, state = lightning_step(q[:, t], k[:, t], v[:, t], log_decay, state)
        assert_close(o, wanted[:, t], 1e-5)
    assert_close(state, final, 1e-5)


def test_vmap_and_remat():
    stacked = [jnp.stack(pair) for pair in zip(*(Case(40).draw(s) for s in (0, 1)), strict=True)]
    check_op(
        jax.checkpoint(jax.vmap(attend("auto"))),
        jax.vmap(attend("reference")),
        stacked,
        wrt=range(5),
        tolerance=1e-5,
    )


def test_one_set_of_decays_may_be_mapped():
    q, k, v, log_decay, _ = Case(20).draw()
    decays = jnp.stack([log_decay, 2 * log_decay])
    outs = jax.vmap(attend("auto"), in_axes=(None, None, None, 0))(q, k, v, decays)
    assert_close(jax.tree.map(lambda x: x[1], outs), attend("auto")(q, k, v, decays[1]), 1e-6)


def test_temporary_memory_does_not_grow_with_the_length():
    @jax.jit
    def both(q, k, v, log_decay, do):
        o, pullback = jax.vjp(lambda *qkv: attend("xla")(*qkv, log_decay)[0], q, k, v)
        return o, pullback(do)

    def temporary_bytes(length):
        q, k, v, log_decay, _ = jax.eval_shape(Case(length).draw)
        compiled = both.lower(q, k, v, log_decay, do=v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 1.1 * temporary_bytes(1024)


def bad_calls():
    q, k, v, log_decay, state = Case(8).draw()
    start = jnp.zeros((2, 8), jnp.int32)
    return {
        "rank": (dict(q=q[0]), "q has shape"),
        "key shape": (dict(k=k[..., :4]), "k has shape"),
        "value heads": (dict(v=v[:, :, :2]), "v has shape"),
        "empty": (dict(q=q[:, :0], k=k[:, :0], v=v[:, :0]), "at least 1"),
        "mixed dtypes": (dict(v=v.astype(jnp.bfloat16)), "dtypes"),
        "integers": (dict(q=q.astype(int), k=k.astype(int), v=v.astype(int)), "dtypes"),
        "decays": (dict(log_decay=log_decay[:2]), "log_decay is"),
        "growth": (dict(log_decay=-log_decay), "at most 0"),
        "not a number": (dict(log_decay=log_decay * jnp.nan), "at most 0"),
        "state shape": (dict(state=state.swapaxes(2, 3)), "state is"),
        "state dtype": (dict(state=state.astype(jnp.bfloat16)), "state is"),
        "doc_start shape": (dict(doc_start=start[0]), "doc_start is"),
        "doc_start dtype": (dict(doc_start=start.astype(jnp.float32)), "doc_start is"),
        "backend": (dict(backend="cuda"), "must be one of"),
        "tiles without a backend": (dict(tiles=XlaTiles()), "tiles="),
        "tiles of another backend": (dict(tiles=XlaTiles(), backend="reference"), "tiles="),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_one_clear_error(name):
    q, k, v, log_decay, _ = Case(8).draw()
    changes, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        lightning_attention(**(dict(q=q, k=k, v=v, log_decay=log_decay) | changes))


def test_bad_input_of_state_and_step():
    q, k, v, log_decay, state = Case(8).draw()
    with pytest.raises(ValueError, match="at most 0"):
        lightning_state(k, v, -log_decay)
    with pytest.raises(ValueError, match="axes must be B H D"):
        lightning_step(q, k, v, log_decay, state)
    with pytest.raises(ValueError, match="chunk=0"):
        XlaTiles(chunk=0)


def test_decay_sign_is_not_checked_when_traced():
    q, k, v, log_decay, _ = Case(8).draw()
    out, _ = jax.jit(attend("auto"))(q, k, v, -log_decay)
    assert np.isfinite(out).all()


def test_slopes():
    np.testing.assert_allclose(printed_log_decay(4, 1, 4), [0, -1.5, -3, -4.5])
    np.testing.assert_allclose(printed_log_decay(2, 3, 4, temperature=False), [0, -4])
    np.testing.assert_allclose(
        alibi_log_decay(8, 3, 4, temperature=False), -(0.5 ** np.arange(1, 9))
    )
    # Twelve heads: the eight slopes of 8, then the first four odd powers of 2^(-1/2).
    odd = 0.5 ** np.array([0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(alibi_log_decay(12, 0, 2, temperature=False)[8:], -odd)
    np.testing.assert_allclose(alibi_log_decay(2, 1, 3), -np.array([2**-4, 2**-8]) * 0.50001)
    np.testing.assert_allclose(alibi_log_decay(1, 0, 1), -(2**-8) * 1.00001)
    for family in (printed_log_decay, alibi_log_decay):
        with pytest.raises(ValueError, match="layer=4"):
            family(8, 4, 4)
        with pytest.raises(ValueError, match="heads=0"):
            family(0, 0, 4)


ONLY_JAX = """
import importlib.metadata, sys
needed = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"}
needed |= {"ml_dtypes", "scipy", "opt_einsum", "wadler_lindig", "jax_plugins"}  # of those
blocked = set(importlib.metadata.packages_distributions()) - needed
assert "flax" in blocked
sys.modules |= dict.fromkeys(blocked)
import jax.numpy as jnp
from pallas_kernels.lightning_attention import lightning_attention
x = jnp.ones((1, 3, 2, 4))
assert lightning_attention(x, x, x, jnp.zeros(2)).shape == x.shape
"""


def test_needs_only_jax_numpy_and_jaxtyping():
    done = subprocess.run([sys.executable, "-c", ONLY_JAX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_kernels_of_all_platforms_are_traced_with_64_bit_types_on(dtype):
    with jax.enable_x64(True):
        q, k, v, log_decay, _ = Case(70).draw()
        q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))

        def gradients(q, k, v):
            o, pullback = jax.vjp(lambda *x: lightning_attention(*x, log_decay), q, k, v)
            return o, pullback(o)

        found = jax.eval_shape(gradients, q, k, v)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
