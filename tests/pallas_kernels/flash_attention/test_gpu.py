"""The Hopper kernels: interpreted with race detection, and run on a GPU where there is one.

The interpreter knows no reductions in GMEM, so it covers the deterministic kernels; the one that
reduces dq is compiled in test_gpu_compiled.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels._pallas import plgpu
from pallas_kernels.flash_attention import Pieces, flash_attention, gpu, gpu_forward, reference
from pallas_kernels.flash_attention.api import make_spec
from pallas_kernels.flash_attention.tiles import GPU_TILES, GpuTiles, KernelTiles, gpu_tiles
from tests.harness import assert_close, check_op
from tests.pallas_kernels.flash_attention.cases import (
    TOLERANCE,
    definition,
    inputs,
    random_intervals,
)

ON_GPU = jax.default_backend() == "gpu"
RUN = {} if ON_GPU else {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU: too long to interpret")

# Small tiles: a ring of k, v turns twice over some 300 keys.
TOGETHER = GpuTiles(
    forward=KernelTiles(q=128, kv=64),
    keys=KernelTiles(q=64, kv=128),
    rows=KernelTiles(q=128, kv=64),
)
BY_ROLE = dataclasses.replace(
    TOGETHER,
    keys=KernelTiles(q=64, kv=64),
    rows=KernelTiles(q=128, kv=64, early_stages=1),
    passes="roles",
)


def check_passes(
    args, lo=None, hi=None, *, tiles, blocks=False, last=False, deterministic=True, **mask
):
    """Both passes against the definition; with `blocks` they continue and add to float32.

    With `last` the forward continues and ends. The interpreter has the deterministic kernels only.
    """
    q, k, v = args
    options = {"causal": True, "window": None, "q_offset": 0, "scale": None, "soft_cap": None}
    spec = make_spec(q, k, v, lo, *(options | mask).values(), deterministic)
    wide = dataclasses.replace(spec, out_dtype=jnp.dtype(jnp.float32))
    keys = iter(jax.random.split(jax.random.key(7), 8))
    do = jax.random.normal(next(keys), (*q.shape[:3], v.shape[3])).astype(q.dtype)
    carry, sums = None, (None, None, None)
    if blocks or last:
        lse = jax.random.normal(next(keys), (q.shape[0], q.shape[2], q.shape[1]))
        carry = jax.random.normal(next(keys), do.shape), lse
    if blocks:
        spec = wide
        sums = tuple(jax.random.normal(next(keys), x.shape) for x in args)

    @jax.jit  # on the CPU: a GPU would tune each of its products
    def wanted(args, do):
        q, k, v, do = (x.astype(jnp.float32) for x in (*args, do))
        o, lse = reference.fwd(q, k, v, lo, hi, carry, spec=wide)
        delta = jnp.einsum("bthe,bthe->bht", o, do)
        return o, lse, delta, reference.bwd(q, k, v, lo, hi, do, lse, delta, sums, spec=wide)

    @jax.jit
    def found(args, do, lse, delta):
        with jax.numpy_dtype_promotion("strict"):
            out = gpu.fwd(*args, lo, hi, carry, spec=spec, tiles=tiles, **RUN)
            rest = lo, hi, do, lse, delta, sums
            return *out, gpu.bwd(*args, *rest, spec=spec, tiles=tiles, **RUN)

    o, lse, delta, gradients = wanted(*jax.device_put((args, do), jax.devices("cpu")[0]))
    *out, grads = found(args, do, *jax.device_put((lse, delta), jax.devices()[0]))
    value, gradient = TOLERANCE[q.dtype]
    assert_close(out, (o, lse), value)
    assert all(x.dtype == spec.out_dtype for x in grads)
    assert_close(grads, gradients, gradient, "gradient")


def check_forward(spec, *operands, tiles=TOGETHER):
    """The forward alone against the definition; interpreted with race detection."""
    found = gpu.fwd(*operands, spec=spec, tiles=tiles, **RUN)
    want = reference.fwd(*operands, spec=spec)
    assert_close(found, want, TOLERANCE[spec.dtype][0])


half = functools.partial(inputs, dtype=jnp.bfloat16)


@pytest.mark.parametrize("tiles", [TOGETHER, BY_ROLE], ids=["together", "roles"])
def test_interpreted_window_offset_and_soft_cap(capfd, tiles):
    args = half(1, 100, 170, heads=2, kv_heads=1, width=40, value_width=64)
    check_passes(args, tiles=tiles, q_offset=70, window=50, soft_cap=2.0)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("width", [64, 128])
def test_interpreted_dq_by_reduction(monkeypatch, width):
    """With one tile of keys a tile of dq gets one term, and a copy does for a reduction."""
    copy = plgpu.copy_smem_to_gmem

    def copied(*args, reduction_op=None, **options):
        return copy(*args, **options)

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", copied)
    args = half(1, 200, 128, heads=1, width=width)
    tiles = dataclasses.replace(TOGETHER, keys=gpu_tiles(width).keys)
    check_passes(args, tiles=tiles, deterministic=False, causal=False)


@pytest.mark.slow
def test_interpreted_keys_that_nobody_sees(capfd):
    args = half(1, 60, 200, heads=1, width=64)
    check_passes(args, tiles=BY_ROLE)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("of", [1, 2], ids=["of all heads", "by head"])
@pytest.mark.parametrize("tiles", [TOGETHER, BY_ROLE], ids=["together", "roles"])
def test_interpreted_intervals_continuing_and_adding(capfd, tiles, of):
    args = half(1, 130, 190, heads=2, kv_heads=1)
    lo, hi = random_intervals((1, of, 130), 190)
    check_passes(args, lo, hi, tiles=tiles, blocks=True, causal=False)
    assert "RACE" not in capfd.readouterr().out


def test_interpreted_last_block_of_a_chain(capfd):
    check_passes(half(1, 130, 190, heads=1), tiles=TOGETHER, last=True, causal=False)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=["half", "float32"])
def test_blocks_that_stay(capfd, monkeypatch, dtype):
    """Two blocks for six query tiles, whose number of key tiles is odd and even."""
    monkeypatch.setattr(gpu_forward, "SMS", 2)
    q, k, v = half(1, 300, 300, heads=2, kv_heads=1)
    spec = make_spec(q, k, v, None)
    spec = dataclasses.replace(spec, out_dtype=jnp.dtype(dtype or q.dtype))
    check_forward(spec, q, k, v, None, None, None)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "width", [64, *(pytest.param(width, marks=needs_gpu) for width in (128, 256))]
)
@pytest.mark.parametrize("growth", [3.0, 300.0], ids=["above the bound", "to infinity"])
def test_scores_that_grow(capfd, width, growth):
    """From tile to tile, of some rows: their exponentials relative to the first tile's maximum."""
    q, k, v = half(1, 200, 320, heads=1, width=width)
    q *= jnp.where(jnp.arange(200) % 7 == 0, 1.0, 0.01)[None, :, None, None].astype(q.dtype)
    k *= (1 + growth * jnp.arange(320)[::-1] / 320)[None, :, None, None].astype(k.dtype)
    tiles = gpu_tiles(width) if ON_GPU else TOGETHER
    check_forward(make_spec(q, k, v, None, False), q, k, v, None, None, None, tiles=tiles)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("size", [64, 56], ids=["whole tiles", "parts of tiles"])
def test_pieces_and_last_rows(capfd, size):
    """Skipped rows, rows that begin and rows that continue: a tile of each, where they are."""
    q, k, v = half(1, 2 * size + 256, 4 * size, heads=2, kv_heads=1)
    late = jax.random.normal(jax.random.key(3), (1, 128, 2, v.shape[3]))
    carry = late, jax.random.normal(jax.random.key(4), (1, 2, 128))
    lo, hi = random_intervals((1, 1, 256), 4 * size)
    order = jnp.array([2, 0, 1, 3], jnp.int32)
    keys, values = (Pieces(jnp.split(x, 2, axis=1), order) for x in (k, v))
    spec = make_spec(q[:, :256], k, v, lo, False)
    spec = dataclasses.replace(spec, out_dtype=jnp.dtype(jnp.float32))
    check_forward(spec, q, keys, values, lo, hi, carry)
    assert "RACE" not in capfd.readouterr().out


@needs_gpu
@pytest.mark.parametrize(
    ("widths", "heads", "dtype"),
    [
        ((64, 64), (4, 4), jnp.bfloat16),
        ((128, 128), (4, 1), jnp.bfloat16),
        ((256, 256), (4, 2), jnp.float16),
        ((64, 128), (2, 2), jnp.float16),
        ((192, 24), (2, 1), jnp.bfloat16),
    ],
)
def test_on_gpu(widths, heads, dtype):
    args = inputs(2, 500, 700, *heads, *widths, dtype=dtype)
    lo, hi = random_intervals((2, 1, 500), 700)
    tiles = gpu_tiles(next(w for w in GPU_TILES if w >= max(widths)))
    check_passes(args, tiles=tiles, deterministic=False, q_offset=200, window=300, soft_cap=5.0)
    check_passes(args, lo, hi, tiles=tiles, deterministic=False, q_offset=100, blocks=True)

    value, gradient = TOLERANCE[args[0].dtype]
    run = functools.partial(flash_attention, return_lse=True, backend="gpu")
    check_op(  # two runs equal bit by bit
        functools.partial(run, deterministic=True),
        definition,
        args,
        wrt=(0, 1, 2),
        tolerance=value,
        grad_tolerance=gradient,
    )


@needs_gpu
def test_one_row_and_batching():
    args = inputs(1, 1, 1, 1, 1, 40, dtype=jnp.bfloat16)
    check_passes(args, tiles=gpu_tiles(64), deterministic=False)
    args = inputs(3, 300, dtype=jnp.bfloat16)

    def gradients(q, k, v):
        return jax.vjp(flash_attention, q[None], k[None], v[None])[1](q[None])

    together = jax.vmap(gradients)(*args)
    assert_close(together[0][1], gradients(*(x[1] for x in args))[0], 1e-3)


def test_refusals():
    q = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(NotImplementedError, match="bfloat16 and float16"):
        flash_attention(q, q, q, backend="gpu")
    wide = jnp.zeros((1, 64, 1, 320), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="above 256"):
        flash_attention(wide, wide, wide, backend="gpu")
    with pytest.raises(ValueError, match="multiple of 64"):
        KernelTiles(q=96, kv=128)
    with pytest.raises(ValueError, match=r"rows\.q=128 must be a multiple of keys\.q=192"):
        dataclasses.replace(TOGETHER, keys=KernelTiles(q=192, kv=128))
    with pytest.raises(ValueError, match=r"keys\.kv=128 must be 64 where passes='roles'"):
        dataclasses.replace(TOGETHER, passes="roles")
    with pytest.raises(ValueError, match="passes='alone' must be"):
        dataclasses.replace(TOGETHER, passes="alone")
    q = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
    numbers = jnp.zeros((1, 1, 64))
    with pytest.raises(
        ValueError, match=r"keys\.q=64 must be keys\.kv=128 where heads are 64 wide"
    ):
        gpu.bwd(
            q, q, q, None, None, q, numbers, numbers, (None, None, None),
            spec=make_spec(q, q, q, None), tiles=TOGETHER,
        )  # fmt: skip


def test_auto_leaves_other_gpus_to_xla():
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    spec = make_spec(x, x, x, None)
    for kind, able in (("NVIDIA A100-SXM4-80GB", False), ("NVIDIA H200", True)):
        device = AbstractDevice(kind, None, "gpu")
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            reason = gpu.unsupported(spec)
        assert (reason is None) == able, reason
