"""Blocks that hand on what travels: by XLA after them, and from within the interpreted kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels._pallas import pl, plgpu
from pallas_kernels.flash_attention import (
    Ring,
    block_backward,
    block_forward,
    gpu,
    gpu_backward_keys,
    gpu_send,
    ring_backward,
    ring_forward,
    row_delta,
)
from pallas_kernels.flash_attention.api import make_spec
from pallas_kernels.flash_attention.gpu_send import SENDERS
from pallas_kernels.flash_attention.tiles import KernelTiles, gpu_tiles
from tests.harness import assert_close
from tests.pallas_kernels.flash_attention.cases import TOLERANCE, inputs

DEVICES = 4


def in_ring(function, *args):
    """`function(ring, *args)` on devices that each have one of as many rows of the arguments."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    run = functools.partial(function, Ring("x", DEVICES, stride=3))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(*args)


def operands(dtype=jnp.float32):
    q, k, v = inputs(DEVICES, 16, 24, heads=2, kv_heads=1, dtype=dtype)
    do = jax.random.normal(jax.random.key(9), q.shape).astype(dtype)
    return q, k, v, do


def test_keys_go_to_the_next_device():
    q, k, v, _ = operands()
    o, lse, *kv = in_ring(ring_forward, q, k, v)
    assert_close((o, lse), block_forward(q, k, v), 1e-6)
    assert_close(kv, [jnp.roll(x, 3, axis=0) for x in (k, v)], 0)


@pytest.mark.parametrize("keys_travel", [False, True])
def test_sums_of_gradients_go_with_the_keys(keys_travel):
    q, k, v, do = operands(jnp.bfloat16)
    o, lse = block_forward(q, k, v)
    args = q, k, v, do, lse, row_delta(o, lse, do, jnp.zeros_like(lse))
    sums = tuple(jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((q, k, v)))

    def block(ring, args, sums):
        how = {"keys_travel": keys_travel, "out_dtype": jnp.bfloat16}
        return ring_backward(ring, *args, accumulate=sums, **how)

    dq, *arrived = in_ring(block, args, sums)
    own_dq, *own = block_backward(*args, accumulate=sums)
    assert_close([dq], [own_dq], 1e-6)
    travel = [*(x.astype(jnp.bfloat16) for x in own), *((k, v) if keys_travel else ())]
    assert [x.dtype for x in arrived] == [jnp.bfloat16] * len(travel)
    assert_close(arrived, [jnp.roll(x, 3, axis=0) for x in travel], 0)


@pytest.fixture
def alone(monkeypatch):
    """The next device is this one; the interpreter knows neither others nor reductions."""
    copy = plgpu.copy_smem_to_gmem
    monkeypatch.setattr(plgpu, "remote_ref", lambda ref, _: ref)
    monkeypatch.setattr(
        plgpu, "copy_smem_to_gmem", lambda *args, reduction_op=None, **how: copy(*args, **how)
    )
    told: list[int] = []
    monkeypatch.setattr(pl, "get_global", lambda _: told)
    monkeypatch.setattr(pl, "semaphore_signal", lambda *_, device_id: None)
    monkeypatch.setattr(pl, "semaphore_wait", lambda told, value, **_: told.append(value))
    monkeypatch.setattr(gpu_send, "Done", InOrder)
    monkeypatch.setattr(gpu_backward_keys, "Done", InOrder)
    return told


class InOrder:
    """The interpreter runs one block after another: see `senders_last`."""

    def __init__(self, tiles):
        self.tiles = tiles

    def tell(self, tile):
        pass

    def wait(self, tile):
        pass


def senders_last(monkeypatch, blocks):
    """Of so many that compute and those that send."""
    place = lax.axis_index

    def moved(name):
        index = place(name)
        return lax.rem(index + SENDERS, blocks + SENDERS) if name == "block" else index

    monkeypatch.setattr(lax, "axis_index", moved)


def run_alone(function):
    """`function(ring, interpret)` on a ring of one device."""
    run = functools.partial(function, Ring("x", 1), plgpu.InterpretGPUParams(detect_races=True))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(), out_specs=P(), check_vma=False))()


def test_interpreted_forward_sends_all_tiles(capfd, alone):
    """Nine tiles of two key heads among a few senders; the last of a head is not whole."""
    q, k, v = inputs(1, 64, 8 * 70, heads=2, kv_heads=2, width=64, dtype=jnp.bfloat16)
    spec = make_spec(q, k, v, None, causal=False)
    o, lse, *kv = run_alone(
        lambda ring, interpret: gpu.fwd(
            q, k, v, None, None, None, spec=spec, ring=ring, interpret=interpret
        )
    )
    assert_close(kv, (k, v), 0)
    wanted = block_forward(q, k, v, out_dtype=q.dtype)
    assert_close((o, lse), wanted, TOLERANCE[q.dtype][0])
    assert set(alone) == {4 * SENDERS}  # warpgroups
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("keys_travel", [False, True])
def test_interpreted_backward_sends_gradients(alone, keys_travel, monkeypatch):
    """With one tile of keys a tile of dq gets one term, and a copy does for a reduction."""
    senders_last(monkeypatch, blocks=2)
    q, k, v = inputs(1, 128, 100, heads=2, kv_heads=2, width=64, dtype=jnp.bfloat16)
    do = jax.random.normal(jax.random.key(9), q.shape).astype(q.dtype)
    o, lse = block_forward(q, k, v)
    rows = do, lse, row_delta(o, lse, do, jnp.zeros_like(lse))
    sums = None, *(jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((k, v)))
    spec = make_spec(q, k, v, None, causal=False)
    dq, dk, dv, *kv = run_alone(
        lambda ring, interpret: gpu.bwd(
            q, k, v, None, None, *rows, sums, spec=spec, ring=ring, keys_travel=keys_travel,
            interpret=interpret,
        )
    )  # fmt: skip
    assert [x.dtype for x in (dk, dv)] == [jnp.bfloat16] * 2
    wanted = block_backward(q, k, v, *rows, accumulate=sums)
    assert_close((dq, dk, dv), wanted, TOLERANCE[q.dtype][1], "gradient")
    assert_close(kv, (k, v) if keys_travel else (), 0)
    assert set(alone) == {3 * SENDERS}


def test_which_backward_sends():
    """By the tiles of the call, where it has some: others' kernels would keep the gradients."""
    q, k, v = inputs(1, 64, 128, heads=1, width=64, dtype=jnp.bfloat16)
    spec, tiles = make_spec(q, k, v, None), gpu_tiles(64)
    by_role = dataclasses.replace(
        tiles, keys=KernelTiles(q=64, kv=64), rows=KernelTiles(q=64, kv=64), passes="roles"
    )
    assert gpu.sends(spec, None) and gpu.sends(spec, tiles)
    assert not gpu.sends(spec, by_role)
    assert not gpu.sends(dataclasses.replace(spec, deterministic=True), None)
