"""The TPU kernels without a TPU: interpreted with race detection, and compiled ahead of time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels._pallas import pltpu
from pallas_kernels.flash_attention import (
    block_backward,
    block_forward,
    flash_attention,
    intervals,
    row_delta,
    tpu,
)
from pallas_kernels.flash_attention.api import make_spec
from pallas_kernels.flash_attention.tiles import TpuTiles, tpu_tiles
from tests.harness import assert_close, check_op, pullback_of, random_like
from tests.pallas_kernels.flash_attention.cases import (
    TOLERANCE,
    definition,
    inputs,
    random_intervals,
)
from tests.topologies import TPUS, tpu_mesh

SMALL = TpuTiles(q=128, kv=128, chunk=128)


@pytest.fixture
def interpreted(capfd):
    parameters = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    with pltpu.force_tpu_interpret_mode(parameters), jax.numpy_dtype_promotion("strict"):
        yield
    assert "RACE" not in capfd.readouterr().out


def attend(q, k, v, lo=None, hi=None, *, tiles=SMALL, **mask):
    return flash_attention(
        q, k, v, lo=lo, hi=hi, return_lse=True, backend="tpu", tiles=tiles, **mask
    )


def check(args, tiles=SMALL, **mask):
    value, gradient = TOLERANCE[args[0].dtype]
    check_op(
        functools.partial(attend, tiles=tiles, **mask),
        functools.partial(definition, **mask),
        args,
        wrt=(0, 1, 2),
        tolerance=value,
        grad_tolerance=gradient,
    )


def test_interpreted_static_mask_and_soft_cap(interpreted):
    # Of three key tiles one is seen whole, two need the mask.
    args = inputs(1, 100, 300, heads=2, kv_heads=1, width=16, value_width=24)
    check(args, q_offset=150, soft_cap=2.0)


def test_interpreted_intervals(interpreted):
    args = inputs(1, 200, 270, heads=2, kv_heads=1, width=16)
    check([*args, *random_intervals((1, 2, 200), 270)], causal=False)


@pytest.mark.slow
def test_interpreted_bfloat16_in_chunks(interpreted):
    args = inputs(1, 200, 500, heads=2, dtype=jnp.bfloat16)
    tiles = TpuTiles(q=128, kv=256, chunk=128)
    check([*args, *random_intervals((1, 200), 500)], tiles=tiles, q_offset=280, window=300)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 1}, {"q_offset": -200}])
@pytest.mark.parametrize("length", [1, 15, 500])
def test_interpreted_masks_and_lengths(interpreted, mask, length):
    check(inputs(2, length, 280, heads=3, kv_heads=1, width=16, value_width=8), **mask)


@pytest.mark.slow
def test_interpreted_vmap_of_intervals(interpreted):
    args = inputs(2, 130, heads=1)
    lo, hi = random_intervals((2, 130), 130)
    run = functools.partial(attend, causal=False)
    got = jax.vmap(lambda *x: run(*(y[None] for y in x)))(*args, lo, hi)
    assert_close([x[:, 0] for x in got], run(*args, lo, hi), 1e-6)


def test_interpreted_blocks(interpreted):
    """Carry in, gradients accumulated: two hops equal all keys at once."""
    how = {"backend": "tpu", "tiles": SMALL}
    q, k, v = inputs(1, 200, 60, heads=4, kv_heads=2, width=16, value_width=24)
    lo, hi = random_intervals((1, 4, 200), 60)
    hi = hi.at[..., 128:].set(30)  # the second hop computes nothing for the second tile
    halves = ((k[:, :30], v[:, :30], 0), (k[:, 30:], v[:, 30:], 30))
    seen = [(jnp.maximum(lo, n) < jnp.minimum(hi, n + 30))[..., :128] for *_, n in halves]
    assert np.unique(jnp.stack(seen).reshape(2, -1), axis=1).shape == (2, 4)  # both, either, none
    carry = None
    for k_n, v_n, start in halves:
        carry = block_forward(q, k_n, v_n, lo=lo - start, hi=hi - start, carry=carry, **how)
    want, pull_back = jax.vjp(lambda *x: definition(*x, lo, hi, causal=False), q, k, v)
    assert_close(carry, want, 2e-6)
    o, lse = carry
    do, dlse = cotangent = random_like(want, jax.random.key(1))
    delta = row_delta(o, lse, do, dlse)
    gradients = pull_back(cotangent)
    base = random_like(gradients, jax.random.key(2))
    dq, dk_v = base[0], []
    for k_n, v_n, start in halves:
        part = slice(start, start + 30)
        dq, *dk_v_n = block_backward(
            q, k_n, v_n, do, lse, delta, lo=lo - start, hi=hi - start,
            accumulate=(dq, base[1][:, part], base[2][:, part]), **how,
        )  # fmt: skip
        dk_v.append(dk_v_n)
    dk, dv = (jnp.concatenate(x, 1) for x in zip(*dk_v, strict=True))
    assert_close((dq, dk, dv), [b + g for b, g in zip(base, gradients, strict=True)], 4e-6)


@pytest.mark.parametrize("stationary", ["row", "key"])
@pytest.mark.parametrize("mask", [{}, {"window": 700}, {"packed": True}], ids=str)
def test_skipped_tiles_are_not_fetched(mask, stationary):
    """In grid order, the streamed block changes once for every tile that runs."""
    mask = dict(mask)
    length, tiles = 4096, TpuTiles(256, 512, 512)
    lo = hi = None
    if mask.pop("packed", False):
        lo = jnp.asarray(np.arange(length) // 1024 * 1024, jnp.int32)[None, None]
        hi = jnp.full_like(lo, length)
    arrays = [jax.ShapeDtypeStruct((2, length, h, 64), jnp.bfloat16) for h in (4, 2, 2)]
    spec = make_spec(*arrays, lo, **mask)
    bounds_of = intervals.row_bounds if stationary == "row" else intervals.column_bounds
    bounds = bounds_of(spec, lo, hi, tiles)
    grid, table = tpu._Grid(spec, stationary, bounds), jnp.stack(bounds, axis=-1).reshape(-1)
    steps = int((bounds.stop - bounds.start).max())
    extents = (*grid.programs, steps)
    ids = jnp.indices(extents, dtype=jnp.int32).reshape(5, -1)
    streamed = ("key", (2, 2, length, 64)) if stationary == "row" else ("row", (2, 4, 64, length))

    def held(*ids):
        return jnp.stack([jnp.int32(x) for x in grid.block(*streamed, ids, table)])

    blocks = jax.vmap(held)(*ids)
    fetches = 1 + int((np.diff(blocks, axis=0) != 0).any(-1).sum())
    running = int((bounds.stop - bounds.start).sum()) * 8 // bounds.start[..., 0].size
    assert running // 2 < fetches <= running + 1


def compile_gradient(generation, dtype, *, heads=4, kv_heads=2, width=128, length=4096, **mask):
    """The compiled value and gradient with batch and heads sharded, intervals per head."""
    mesh = tpu_mesh(generation, {"data": 2, "tensor": 2})
    spec = P("data", None, "tensor")

    def function(q, k, v, lo):
        return flash_attention(q, k, v, lo=lo, return_lse=True, **mask)

    def run(args, cotangent):
        return pullback_of(function, (0, 1, 2))(args, cotangent)

    in_specs = ((spec, spec, spec, P("data", "tensor")), (spec, P("data", "tensor")))
    out_specs = ((spec, P("data", "tensor")), (spec, spec, spec))
    local = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    q, k = ((2, length, h, width) for h in (heads, kv_heads))
    shapes = (
        ((q, dtype), (k, dtype), (k, dtype), ((2, heads, length), jnp.int32)),
        ((q, dtype), ((2, heads, length), jnp.float32)),
    )
    args = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, p)),
        shapes,
        in_specs,
        is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x[-1], tuple),
    )
    return jax.jit(local).lower(*args).compile()


def check_compiled(compiled, dtype, width=128, length=4096):
    text = compiled.as_text()
    for kernel in ("forward", "dq", "dk_dv"):
        assert f"flash_attention_{kernel}" in text, f"the {kernel} kernel is not in the program"
    assert set(re.findall(r"(while|all-\w+|collective-permute)\(", text)) == set()
    # One device holds one row and two heads. Each of the eight arrays needs at most one relayout.
    rows, lanes = (-(-n // m) * m for n, m in ((length, 1024), (width, 128)))
    operand = rows * 2 * lanes * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 8.1 * operand


def test_auto_compiles_for_tpu_sharded_with_64_bit_types():
    with jax.enable_x64(True):
        compiled = compile_gradient("v5e", jnp.bfloat16, length=2000)
    check_compiled(compiled, jnp.bfloat16, length=2000)


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("generation", TPUS)
def test_compiles_everywhere(generation, width, dtype, x64):
    """Default tiles of every width and dtype fit the fast memory of every generation."""
    with jax.enable_x64(x64):
        compiled = compile_gradient(generation, dtype, width=width, length=2500, soft_cap=9.0)
    check_compiled(compiled, dtype, width, 2500)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dtype"), [(128, jnp.bfloat16), (256, jnp.float32)])
@pytest.mark.parametrize("generation", TPUS)
def test_carries_fit_the_fast_memory(generation, width, dtype):
    """Beside the largest default tiles."""
    place = NamedSharding(tpu_mesh(generation, {"data": 4}), P("data"))

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((4, *shape), dtype, sharding=place)

    q, lse = of(dtype, 2048, 4, width), of(jnp.float32, 4, 2048)
    k, o = of(dtype, 2048, 2, width), of(jnp.float32, 2048, 4, width)

    def hop(q, k, v, o, lse, dq):
        kept = dq, None, None
        return (
            block_forward(q, k, v, carry=(o, lse)),
            block_backward(q, k, v, o, lse, lse, accumulate=kept, out_dtype=jnp.float32),
        )

    local = jax.shard_map(hop, mesh=place.mesh, in_specs=P("data"), out_specs=P("data"))
    text = jax.jit(local).lower(q, k, k, o, lse, o).compile().as_text()
    assert all(f"flash_attention_{kernel}" in text for kernel in ("forward", "dq"))


def test_refusals_name_the_reason():
    q, k, v = inputs(dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match=r"bfloat16 and float32, not float16.*xla"):
        flash_attention(q, k, v, backend="tpu")
    q, k, v = (jax.ShapeDtypeStruct((8, 2**20, h, 128), jnp.bfloat16) for h in (32, 8, 8))
    lo = jax.ShapeDtypeStruct((8, 32, 2**20), jnp.int32)
    assert "scalar memory" in tpu.unsupported(make_spec(q, k, v, lo))
    assert tpu.unsupported(make_spec(q, k, v, None)) is None


def test_tiles_are_validated():
    with pytest.raises(ValueError, match="q=64 must be a positive multiple of 128"):
        TpuTiles(64, 128, 128)
    with pytest.raises(ValueError, match="chunk=256 must divide kv=384"):
        TpuTiles(128, 384, 256)
    spec = make_spec(*inputs(length=200, kv_length=900), None)
    assert tpu_tiles(spec) == TpuTiles(256, 1024, 512)
