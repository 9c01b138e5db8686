"""How flash_attention behaves as a JAX function: transforms, meshes, memory, refusals."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.flash_attention import (
    Pieces,
    Tiles,
    block_backward,
    block_forward,
    flash_attention,
)
from pallas_kernels.flash_attention.tiles import TpuTiles
from tests.harness import assert_close, pullback_of
from tests.pallas_kernels.flash_attention.cases import (
    TOLERANCE,
    definition,
    inputs,
    random_intervals,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

attend = functools.partial(flash_attention, return_lse=True, backend="xla", tiles=Tiles(16, 16))


def with_lo(function):
    return lambda q, k, v, lo: function(q, k, v, lo=lo)


def test_vmap_and_remat():
    q, k, v = inputs(6, 30, heads=4, kv_heads=2)
    lo, _ = random_intervals((6, 30), 30)
    args = (q, k, v, lo)
    split = [x.reshape(3, 2, *x.shape[1:]) for x in args]
    cotangent = jax.tree.map(jnp.ones_like, definition(q, k, v, lo))
    split_cotangent = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), cotangent)
    mapped = jax.vmap(jax.checkpoint(with_lo(attend)))
    got = pullback_of(mapped, (0, 1, 2))(split, split_cotangent)
    want = pullback_of(definition, (0, 1, 2))(args, cotangent)
    assert_close([x.reshape(6, *x.shape[2:]) for x in jax.tree.leaves(got)], want, 4e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "kv_heads, dtype",
    [(4, jnp.float32), (1, jnp.bfloat16)],
    ids=["heads sharded", "one kv head replicated"],
)
def test_sharded_batch_and_heads(axis_type, kv_heads, dtype):
    """Equal values and gradients, and no device sees another's activations."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    q_spec = P("data", None, "tensor", None)
    k_spec = q_spec if kv_heads > 1 else P("data")
    specs = (q_spec, k_spec, k_spec, P("data"))
    out_specs = (q_spec, P("data", "tensor"))
    *qkv, lo = (
        *inputs(4, 30, heads=4, kv_heads=kv_heads, dtype=dtype),
        random_intervals((4, 30), 30)[0],
    )
    wide = (*(x.astype(jnp.float32) for x in qkv), lo)
    cotangent = jax.tree.map(jnp.ones_like, definition(*wide))
    want = pullback_of(definition, (0, 1, 2))(wide, cotangent)
    args, cotangent = (*qkv, lo), (cotangent[0].astype(dtype), cotangent[1])

    def place(trees, specs):
        return tuple(
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(trees, specs, strict=True)
        )

    with jax.set_mesh(mesh):
        auto = functools.partial(flash_attention, return_lse=True)
        local = jax.shard_map(with_lo(auto), in_specs=specs, out_specs=out_specs)
        run = pullback_of(local, (0, 1, 2))
        args, cotangent = place(args, specs), place(cotangent, out_specs)
        assert_close(run(args, cotangent), want, max(TOLERANCE[jnp.dtype(dtype)]))
        hlo = run.lower(args, cotangent).compile().as_text()
    collectives = set(re.findall(r"(all-\w+|reduce-scatter|collective-permute)\(", hlo))
    assert collectives == ({"all-reduce"} if kv_heads == 1 else set())


def test_memory_is_linear_in_length():
    def temporary_bytes(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)] * 3
        lo = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = pullback_of(lambda q, k, v, lo: flash_attention(q, k, v, lo=lo), (0, 1, 2))
        compiled = run.lower((*arrays, lo), arrays[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2**14), temporary_bytes(2**15)
    assert long < 2.1 * short
    assert long < 20 * 2**15 * 64 * 4  # a few copies of one input, nowhere near T x T


Q, K, V = (np.zeros(s, np.float32) for s in ((2, 8, 4, 16), (2, 9, 2, 16), (2, 9, 2, 24)))
BAD = {
    "rank": (dict(q=Q[0]), "q and k must be"),
    "width": (dict(k=K[..., :8]), "must agree in batch and width"),
    "values": (dict(v=V[:, :5]), "must agree in batch, length and heads"),
    "heads": (dict(q=Q[:, :, :3]), "3 query heads must be a multiple of 2"),
    "nothing": (dict(q=Q[:, :0]), "no axis may be empty"),
    "dtype": (dict(k=K.astype(np.float16)), "one floating dtype"),
    "integers": (dict(q=Q.astype(np.int32)), "one floating dtype"),
    "window": (dict(window=0), "window=0 must be at least 1"),
    "soft cap": (dict(soft_cap=-1.0), "soft_cap=-1.0 must be positive"),
    "interval shape": (dict(lo=np.zeros((2, 9), np.int32)), "lo must be .B, T. = .2, 8."),
    "interval dtype": (dict(hi=np.zeros((2, 8), np.float32)), "hi must be integer"),
    "backend": (dict(backend="cuda"), "backend='cuda' must be one of"),
    "window of half a key": (dict(window=2.5), "window=2.5 must be a Python Integral number"),
    "offset in an array": (dict(q_offset=np.zeros(2)), "q_offset=.* must be a Python Integral"),
    "scale in a word": (dict(scale="small"), "scale='small' must be a Python Real number"),
    "tiles": (dict(tiles=Tiles(16, 16)), "name it instead of"),
    "tiles of another backend": (
        dict(tiles=TpuTiles(128, 128, 128), backend="xla"),
        "must be Tiles",
    ),
    "tiles without use": (dict(tiles=Tiles(16, 16), backend="reference"), "must be None"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_says_which_rule_it_breaks(change, message):
    arguments = {"q": Q, "k": K, "v": V} | change
    q, k, v = (jnp.asarray(arguments.pop(name)) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, **arguments)


def test_bad_tiles():
    with pytest.raises(ValueError, match="kv=0 must be positive"):
        Tiles(16, 0)


def test_numbers_beyond_int32_do_not_wrap():
    x = jnp.ones((1, 6, 1, 8)) * jnp.arange(1.0, 7.0)[None, :, None, None]
    want = flash_attention(x, x, x)
    for no_limit in (np.full((1, 6), 2**40), np.full((1, 6), 2**32 - 1, np.uint32)):
        assert_close(flash_attention(x, x, x, hi=no_limit), want, 1e-6)
    assert_close(flash_attention(x, x, x, window=sys.maxsize), want, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"soft_cap": math.inf}, {"scale": math.nan}, {"q_offset": 2**31 - 4}, {"q_offset": None}],
)
def test_numbers_that_mean_nothing_are_refused(wrong):
    x = jnp.ones((1, 6, 1, 8))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        flash_attention(x, x, x, **wrong)


def test_a_hop_is_told_which_array_does_not_fit():
    x, lse = jnp.ones((1, 6, 1, 8)), jnp.ones((1, 1, 6))
    with pytest.raises(ValueError, match=r"o of carry must be of shape \(1, 6, 1, 8\)"):
        block_forward(x, x, x, carry=(x[..., :3], lse))
    with pytest.raises(ValueError, match=r"lse of carry must be of shape \(1, 1, 3\)"):
        block_forward(x, x, x, carry=(x[:, :3], lse))
    with pytest.raises(ValueError, match="first_row=6 must be one of the 6 rows"):
        block_forward(x, x, x, first_row=6)
    halves = Pieces((x, x), jnp.arange(4))
    with pytest.raises(ValueError, match="both be Pieces, or neither"):
        block_forward(x, halves, x)
    with pytest.raises(ValueError, match="of one shape"):
        block_forward(x, Pieces((x, x[:, :3]), jnp.arange(4)), halves)
    for order in (jnp.arange(5), jnp.arange(9), jnp.zeros((2, 2), jnp.int32)):
        with pytest.raises(ValueError, match="must name 2 to 8 pieces"):
            block_forward(x, Pieces((x, x), order), halves)
    with pytest.raises(ValueError, match="lse must be of shape"):
        block_backward(x, x, x, x, lse.swapaxes(1, 2), lse)
    with pytest.raises(ValueError, match="dq of accumulate"):
        block_backward(x, x, x, x, lse, lse, accumulate=(x[:, :3], None, None))
