"""The Hopper kernels: interpreted with race detection, compiled ahead of time, and run on a GPU."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels._pallas import plgpu
from pallas_kernels.lightning_attention import (
    gpu,
    lightning_attention,
    lightning_dstate,
    lightning_pieces,
    lightning_state,
    reference,
)
from pallas_kernels.lightning_attention.gpu_states import NEGLIGIBLE
from pallas_kernels.lightning_attention.tiles import GpuTiles, Spec, gpu_tiles
from tests.harness import assert_close, check_op
from tests.pallas_kernels.lightning_attention.cases import (
    Case,
    attend,
    final_state,
    initial_cotangent,
)
from tests.ptxas import ptxas as ptxas
from tests.topologies import gpu_mesh

ON_GPU = jax.default_backend() == "gpu"
TOKENS, STATES = P("data", None, "tensor"), P("data", "tensor")
TOLERANCE = {jnp.bfloat16: 5e-3, jnp.float16: 1e-3}
SPLIT = GpuTiles(segments=2, workers=2, stages=2)


@contextlib.contextmanager
def device():
    """The GPU if there is one, else the interpreter of its kernels."""
    with jax.numpy_dtype_promotion("strict"):
        if ON_GPU:
            yield
            return
        params = plgpu.InterpretGPUParams(detect_races=True)
        printed = contextlib.redirect_stdout(io.StringIO())
        with plgpu.force_gpu_interpret_mode(params), printed as out:
            yield
        assert "RACE" not in out.getvalue(), out.getvalue()


def check(case: Case, documents: jax.Array | None = None, tiles: GpuTiles | None = None):
    args = (*case.draw(), *([] if documents is None else [documents]))
    with device():
        check_op(
            attend("gpu", tiles=tiles),
            attend("reference"),
            args,
            wrt=(0, 1, 2, 4),
            tolerance=TOLERANCE[case.dtype],
        )


one_head = functools.partial(Case, batch=1, heads=1, dtype=jnp.bfloat16)
small = functools.partial(one_head, key_width=64, value_width=64)


def test_shorter_than_a_chunk():
    check(small(15, dtype=jnp.float16))


def test_packed_and_split():
    case = small(135)
    check(case, case.documents(), SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [None, GpuTiles(segments=2, workers=1, stages=2)])
@pytest.mark.parametrize("widths", [(20, 128), (96, 192), (256, 128)])
def test_widths(widths, tiles):
    case = one_head(260, heads=2, key_width=widths[0], value_width=widths[1])
    check(case, case.documents(), tiles)


def test_state_alone():
    case = small(135)
    with device():
        check_op(
            final_state("gpu"),
            final_state("reference"),
            (*case.draw()[1:], case.documents()),
            wrt=(0, 1, 3),
            tolerance=TOLERANCE[case.dtype],
        )
        q, _, do, log_decay, _ = case.draw()
        args = (q, do, log_decay, case.documents())
        got, wanted = (initial_cotangent(backend)(*args) for backend in ("gpu", "reference"))
    assert_close(got, wanted, TOLERANCE[case.dtype])


@pytest.mark.parametrize("length", [135, pytest.param(260, marks=pytest.mark.slow)])
def test_states_alone_of_segments(length):
    # The second head's decay hides the segments that are far from where the state is wanted.
    case = small(length, heads=2)
    q, k, v, log_decay, state = case.draw()
    assert 64 * log_decay[1] < -NEGLIGIBLE * np.log(2) / 2
    tiles = GpuTiles(segments=-(-length // 64), workers=2, stages=2)
    for doc_start in (None, case.documents(every=length)):
        with device():
            final = gpu.final_state(k, v, log_decay, state, doc_start, tiles=tiles)
            dstate = gpu.initial_cotangent(q, v, log_decay, doc_start, tiles=tiles)
        wanted = reference.final_state(k, v, log_decay, state, doc_start)
        assert_close(final, wanted, TOLERANCE[case.dtype])
        wanted = reference.initial_cotangent(q, v, log_decay, doc_start)
        assert_close(dstate, wanted, TOLERANCE[case.dtype])


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU: too long to interpret")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("length", [1000, 1023, 4096])
def test_on_gpu(length, dtype):
    case = Case(length, heads=4, key_width=128, value_width=128, dtype=dtype)
    check(case)
    check(case, case.documents(every=200))


def test_refusals():
    spec = Spec(1, 64, 1, 64, 64, jnp.dtype(jnp.float32), packed=False)
    assert "bfloat16 or float16, not float32" in gpu.unsupported(spec)
    q = jnp.zeros((1, 64, 1, 64))
    with pytest.raises(NotImplementedError, match=r"not float32; .*'xla'"):
        lightning_attention(q, q, q, jnp.zeros(1), backend="gpu")
    wide = jnp.zeros((1, 64, 1, 320), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 256"):
        lightning_attention(wide, wide, wide, jnp.zeros(1), backend="gpu")
    with pytest.raises(ValueError, match="workers=3"):
        GpuTiles(segments=1, workers=3, stages=2)


def test_default_tiles_fill_the_chip():
    assert gpu_tiles(heads=256, chunks=32, slices=[2], widest=2) == GpuTiles(1, 2, 2)
    assert gpu_tiles(heads=64, chunks=128, slices=[2], widest=2) == GpuTiles(1, 1, 3)
    few = gpu_tiles(heads=16, chunks=512, slices=[2], widest=2)
    assert few.segments >= 6 and few.workers == 2
    assert gpu_tiles(heads=1, chunks=2, slices=[1], widest=1).segments == 1


def test_pieces_are_not_cut_further():
    def pieces(batch, length, heads, backend="gpu"):
        q = jax.ShapeDtypeStruct((batch, length, heads, 128), jnp.bfloat16)
        count = lightning_pieces(q, q, backend=backend)
        assert length % (64 * count) == 0 or count == 1
        return count

    count = pieces(2, 16384, 8)
    tiles = gpu_tiles(heads=16 * count, chunks=256 // count, slices=[2], widest=2)
    assert count > 1 and tiles.segments == 1
    assert pieces(16, 2048, 16) == pieces(1, 1000, 1) == pieces(2, 16384, 8, "xla") == 1
    assert pieces(1, 2**20, 1) == gpu.MOST_PIECES


def compile_for_h100(
    widths: tuple[int, int], length: int, dtype: jnp.dtype, packed: bool, axis_type: AxisType
):
    """Forward and backward in a user's shard_map over 2 x 2 GPUs, batch and heads, up to ptxas."""
    mesh = gpu_mesh({"data": 2, "tensor": 2}, axis_type)

    def gradients(q, k, v, log_decay, state, doc_start, cotangent):
        def run(q, k, v, state):
            options = {"state": state, "doc_start": doc_start, "return_state": True}
            return lightning_attention(q, k, v, log_decay, **options)

        out, pullback = jax.vjp(run, q, k, v, state)
        alone = (
            lightning_state(k, v, log_decay, doc_start=doc_start),
            lightning_dstate(q, cotangent[0], log_decay, doc_start=doc_start),
        )
        return out, pullback(cotangent), alone

    def shape(spec, *sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    heads, (D, E) = 16, widths
    k, v = (shape(TOKENS, 2, length, heads, width) for width in widths)
    state = shape(STATES, 2, heads, D, E, dtype=jnp.float32)
    documents = shape(P("data"), 2, length, dtype=jnp.int32) if packed else None
    log_decay = shape(P("tensor"), heads, dtype=jnp.float32)
    outs = (TOKENS, STATES)
    in_specs = (TOKENS, TOKENS, TOKENS, P("tensor"), STATES, P("data"), outs)
    out_specs = (outs, (TOKENS,) * 3 + (STATES,), (STATES, STATES))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(sharded).lower(k, k, v, log_decay, state, documents, (v, state)).compile()


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("widths", "length", "packed", "axis_type", "most_spilled"),  # bytes a thread
    [
        ((128, 128), 2**20, False, AxisType.Auto, 600),
        slow((128, 128), 4096, True, AxisType.Explicit, 900),
        slow((64, 64), 1000, True, AxisType.Auto, 50),
        slow((96, 96), 4096, False, AxisType.Auto, 650),
        slow((192, 96), 1000, True, AxisType.Auto, 650),
        slow((256, 128), 4096, True, AxisType.Explicit, 600),
        slow((256, 256), 4096, False, AxisType.Auto, 1300),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
def test_compiles_for_h100(widths, length, packed, axis_type, most_spilled, dtype, ptxas):
    """Too much shared memory is an error; few registers are spilled; nothing is gathered.

    Nor is anything quadratic in memory.
    """
    compiled = compile_for_h100(widths, length, dtype, packed, axis_type)
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') >= 4
    for kind in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "while("):
        assert kind not in text, kind
    # Of one device: states of at most 64 segments, and operands with wider heads or whole tiles.
    D, E = (next(x for x in (64, 128, 256) if x >= width) for width in widths)
    states = min(64, length // 256) * 8 * D * E * 4
    padded = 8 * length * 8 * (D + E) if widths != (D, E) or length % 256 else 0
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * states + padded
    assert max(ptxas.spilled()) <= most_spilled, ptxas.spilled()
