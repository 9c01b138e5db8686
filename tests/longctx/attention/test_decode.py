import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longctx.attention.decode import decode_attention
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import make_mesh
from tests.harness import assert_close

B, S, H, K, D, E = 2, 32, 4, 2, 8, 12


def operands(new):
    rng = np.random.default_rng(0)
    shapes = (B, new, H, D), (B, S, K, D), (B, S, K, E)
    q, keys, values = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return q, keys, values, np.array([0, 21], np.int32)


def expected(q, keys, values, start, window):
    """Row by row, over exactly the keys that it sees."""
    o = np.zeros((*q.shape[:3], E), np.float32)
    for b in range(B):
        for t in range(q.shape[1]):
            stop = start[b] + t + 1
            seen = slice(0 if window is None else max(stop - window, 0), stop)
            for h in range(H):
                k, v = keys[b, seen, h // (H // K)], values[b, seen, h // (H // K)]
                p = np.exp(k @ q[b, t, h] / np.sqrt(D))
                o[b, t, h] = p @ v / p.sum()
    return o


@pytest.mark.parametrize(
    ("layout", "window", "new"),
    [
        (Layout("contiguous", 4), None, 1),
        (Layout("zigzag", 4), 5, 3),
        (Layout("striped", 2), None, 3),
    ],
)
def test_equals_one_device(layout, window, new):
    q, keys, values, start = operands(new)
    want = expected(q, keys, values, start, window)
    with jax.set_mesh(make_mesh(seq=4, tensor=2)):
        run = jax.jit(lambda *a: decode_attention(*a, layout=layout, window=window))
        compiled = run.lower(q, *layout.apply((keys, values)), start).compile()
        got = compiled(q, *layout.apply((keys, values)), start)
    assert_close(got, want, 1e-6)


def test_one_collective_of_a_size_independent_of_the_cache():
    texts = []
    for slots in (64, 1024):
        q = jax.ShapeDtypeStruct((B, 1, H, D), jnp.float32)
        cache = jax.ShapeDtypeStruct((B, slots, K, D), jnp.float32)
        start = jax.ShapeDtypeStruct((B,), jnp.int32)
        mesh = make_mesh(seq=8)
        with jax.set_mesh(mesh):
            run = jax.jit(
                decode_attention,
                in_shardings=(P(), P(None, "seq"), P(None, "seq"), P()),
            )
            texts.append(run.lower(q, cache, cache, start).compile().as_text())
    for text in texts:
        gathers = [line for line in text.splitlines() if " all-gather(" in line]
        assert len(gathers) == 1
        assert f"f32[8,{B},1,{H},{D + 1}]" in gathers[0]
        assert not any(f" {kind}(" in text for kind in ("all-reduce", "collective-permute"))


def test_fewer_key_heads_than_devices_along_the_heads():
    """And none along the sequence."""
    q, keys, values, start = operands(1)
    want = expected(q, keys, values, start, None)
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        assert_close(jax.jit(decode_attention)(q, keys, values, jnp.asarray(start)), want, 1e-6)


def test_one_device_and_errors():
    q, keys, values, start = operands(1)
    want = expected(q, keys, values, start, None)
    assert_close(decode_attention(q, keys, values, jnp.asarray(start)), want, 1e-6)
    for wrong in (jnp.zeros((3,), jnp.int32), jnp.zeros((B,))):
        with pytest.raises(ValueError, match="start must be integer"):
            decode_attention(q, keys, values, wrong)
    with pytest.raises(ValueError, match="window=2"):
        decode_attention(q, keys, values, jnp.asarray(start), window=2.0)
    with jax.set_mesh(make_mesh(seq=4)), pytest.raises(ValueError, match="length=30"):
        decode_attention(q, keys[:, :30], values[:, :30], jnp.asarray(start))
    with jax.set_mesh(make_mesh(seq=4)), pytest.raises(ValueError, match="axis='time'"):
        decode_attention(q, keys, values, jnp.asarray(start), axis="time")
