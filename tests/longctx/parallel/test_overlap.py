import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.bench.ring import topology
from longctx.compiler import training_options
from longctx.parallel import context_attention, context_lightning, make_mesh, verify_overlap
from tests import topologies as local_topologies

KERNEL = 'custom-call(%q, %kv), custom_call_target="tpu_custom_call"'
SCHEDULE = """HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->f32[]}}

%loop_body (p: (bf16[4,8])) -> (bf16[4,8]) {{
  %p = (bf16[4,8]) parameter(0)
  %x = bf16[4,8] get-tuple-element(%p), index=0
  %all = f32[16,8]{{1,0}} all-gather(%x), dimensions={{0}}
  ROOT %t = (bf16[4,8]) tuple(%x)
}}

%cond (p.1: (bf16[4,8])) -> pred[] {{
  %p.1 = (bf16[4,8]) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (q: bf16[4,8], kv: bf16[4,8]) -> bf16[4,8] {{
  %q = bf16[4,8]{{1,0}} parameter(0)
  %kv = bf16[4,8]{{1,0}} parameter(1)
  %start = (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}, u32[], u32[]) collective-permute-start(%kv){config}
  {between}
  %done = bf16[4,8]{{1,0}} collective-permute-done(%start)
  %kept = bf16[4,8]{{1,0}} copy(%done)
  %w = (bf16[4,8]) while(%tuple), condition=%cond, body=%loop_body
  ROOT %r = bf16[4,8]{{1,0}} {kernel}
}}
"""


def schedule(between="", config=""):
    return SCHEDULE.format(kernel=KERNEL, between=between, config=config)


def test_reads_a_schedule():
    hidden = verify_overlap(schedule(f"%attention = bf16[4,8] {KERNEL}"), copies_of=64)
    permute, gather = hidden.moves
    assert (permute.kind, permute.bytes, permute.synchronous) == ("collective-permute", 64, False)
    assert permute.hidden_by == ("attention",) and not permute.exposed
    assert (gather.kind, gather.bytes, gather.synchronous) == ("all-gather", 512, True)
    assert hidden.exposed == (gather,) and hidden.of("all-gather") == (gather,)
    assert hidden.copies == (("kept", 64),)
    assert "behind attention" in str(hidden) and "synchronous" in str(hidden)
    light = "%c = bf16[4,8] fusion(%q), kind=kLoop, calls=%cond"
    assert verify_overlap(schedule(light)).moves[0].exposed
    sync = schedule(config=', backend_config={"is_sync":true}')
    assert verify_overlap(sync).moves[0].synchronous
    with pytest.raises(ValueError, match="scheduled"):
        verify_overlap("HloModule jit_f, entry_computation_layout={()->f32[]}")


def compile_for(devices, operator, *, local, heads=2, kv_heads=None, backward=True):
    """`operator(q, k, v)` and its gradients for `devices`, `local` tokens each, D = 128."""
    mesh = make_mesh(seq=len(devices), devices=devices)
    place = NamedSharding(mesh, P(None, "seq"))
    q, kv = (
        jax.ShapeDtypeStruct((1, local * len(devices), h, 128), jnp.bfloat16, sharding=place)
        for h in (heads, kv_heads or heads)
    )

    def both(q, k, v, do):
        o, pull = jax.vjp(operator, q, k, v)
        return (o, *pull(do)) if backward else o

    with jax.set_mesh(mesh):
        return jax.jit(both).lower(q, kv, kv, q).compile(compiler_options=training_options())


def devices_for(chip, count):
    """So many devices of a chip to compile for; skips the test where they cannot be had."""
    if chip == "h100":
        return list(local_topologies.gpu_mesh({"x": count}).devices)
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    return list(topology.devices_of(chip, count))


def assert_ring_is_hidden(overlap, devices, *, local, kv_heads):
    """Every move of a forward and a backward lies behind a block, and there are no others."""
    moves = overlap.of("collective-permute")
    assert overlap.moves == moves
    # In each of n - 1 hops: keys and values, twice, and once their gradients. XLA joins small ones.
    hop = 2 * local * kv_heads * 128 * (2 * 2 + 4)
    assert sum(move.bytes * move.times for move in moves) == (devices - 1) * hop
    assert len(moves) <= 5 * (devices - 1)
    assert not overlap.exposed, str(overlap)
    assert not any(move.synchronous for move in moves), str(overlap)


RING = functools.partial(context_attention, strategy="ring", layout="zigzag")


@pytest.mark.parametrize(
    ("generation", "devices", "local", "heads"),
    [
        ("v5e", 4, 256, 2),
        *(
            pytest.param(chip, devices, 8192, 16, marks=pytest.mark.slow)
            for chip in ("v5e", "v5p", "v6e")
            for devices in (4, 16)
        ),
    ],
)
def test_ring_on_tpus(generation, devices, local, heads):
    compiled = compile_for(devices_for(generation, devices), RING, local=local, heads=heads)
    assert_ring_is_hidden(verify_overlap(compiled), devices, local=local, kv_heads=heads)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_small_moves_of_a_ring_on_tpus(chip):
    """Eight query heads share a key head."""
    compiled = compile_for(devices_for(chip, 4), RING, local=8192, heads=64, kv_heads=8)
    assert_ring_is_hidden(verify_overlap(compiled), 4, local=8192, kv_heads=8)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_ring_on_h100(devices):
    compiled = compile_for(devices_for("h100", devices), RING, local=8192, heads=8)
    assert_ring_is_hidden(verify_overlap(compiled), devices, local=8192, kv_heads=8)
    # dk and dv of a block are written as the message that they become.
    assert not re.search(r"= f32\[2,1,\d+,8,128\]\S* concatenate\(", compiled.as_text())


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "devices"), [("h100", 2), ("h100", 4), ("v5e", 4)])
def test_rings_of_few_heads_need_less_memory(chip, devices):
    """Their moves are hidden as those of all heads are."""
    together, one_by_one = (
        compile_for(devices_for(chip, devices), operator, local=8192, heads=8)
        for operator in (RING, functools.partial(RING, head_groups=8))
    )
    overlap = verify_overlap(one_by_one)
    assert_ring_is_hidden(overlap, devices, local=8192, kv_heads=8)
    assert {move.times for move in overlap.moves} == {8}
    few, many = (x.memory_analysis().temp_size_in_bytes for x in (one_by_one, together))
    assert few <= (0.4 if chip == "v5e" else 0.35) * many


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("local", [8192, 32768])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100"])
def test_temporary_memory_does_not_grow_with_the_number_of_devices(request, chip, local, backward):
    """With shards too large for the chip's fast memory, at a fixed length per device."""
    if (chip, local, backward) == ("v5e", 8192, False):
        reason = "its fast memory holds some of the buffers, more of them for 4 devices than for 16"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    four, sixteen = (
        compile_for(devices_for(chip, n), RING, local=local, heads=16, backward=backward)
        .memory_analysis()
        .temp_size_in_bytes
        for n in (4, 16)
    )
    assert sixteen <= 1.1 * four


@pytest.mark.slow
def test_lasp_on_tpus_gathers_states_only():
    def lightning(q, k, v):
        return context_lightning(q, k, v, jnp.full(2, -0.1), layout="zigzag")

    overlap = verify_overlap(compile_for(devices_for("v5e", 4), lightning, local=256))
    state = 2 * 2 * 128 * 128 * 4  # two runs of two heads
    assert overlap.moves == overlap.of("all-gather")  # forward and backward, or both at once
    assert {move.bytes for move in overlap.moves} == {4 * state}
