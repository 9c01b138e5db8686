"""The Hopper kernels: interpreted with race detection, compiled ahead of time, and run on a GPU."""

import contextlib
import functools
import io
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels._pallas import plgpu
from pallas_kernels.lightning_attention import gpu, lightning_attention
from pallas_kernels.lightning_attention.tiles import GpuTiles, Spec, gpu_tiles
from tests.harness import check_op
from tests.pallas_kernels.lightning_attention.cases import Case, attend, final_state
from tests.topologies import gpu_mesh

ON_GPU = jax.default_backend() == "gpu"
DATA = P("data")
MOST_SPILLED = 1500  # bytes a thread, by the three sweeps of a packed backward
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
@pytest.mark.parametrize("tiles", [None, SPLIT])
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


def compile_for_h100(widths: tuple[int, int], length: int, dtype: jnp.dtype, packed: bool):
    """Forward and backward under shard_map, batch over two GPUs, as far as ptxas."""
    mesh = gpu_mesh({"data": 2})

    def shape(*sizes, dtype=dtype, spec=DATA):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def gradients(q, k, v, log_decay, state, doc_start, cotangent):
        def run(q, k, v, state):
            options = {"state": state, "doc_start": doc_start, "return_state": True}
            return lightning_attention(q, k, v, log_decay, **options)

        out, pullback = jax.vjp(run, q, k, v, state)
        return out, pullback(cotangent)

    heads, (D, E) = 16, widths
    k, v = (shape(2, length, heads, width) for width in widths)
    state = shape(2, heads, D, E, dtype=jnp.float32)
    documents = shape(2, length, dtype=jnp.int32) if packed else None
    log_decay = shape(heads, dtype=jnp.float32, spec=P())
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(DATA, DATA, DATA, P(), DATA, DATA, DATA), out_specs=DATA
    )
    return jax.jit(sharded).lower(k, k, v, log_decay, state, documents, (v, state)).compile()


@pytest.mark.parametrize(
    ("widths", "length", "packed"),
    [
        ((128, 128), 4096, False),
        pytest.param((64, 64), 1000, True, marks=pytest.mark.slow),
        pytest.param((192, 96), 1000, True, marks=pytest.mark.slow),
        pytest.param((256, 128), 4096, True, marks=pytest.mark.slow),
        pytest.param((256, 256), 4096, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_compiles_for_h100(widths, length, packed, dtype, tmp_path, monkeypatch):
    """Too much shared memory is an error; few registers are spilled; nothing is gathered."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = compile_for_h100(widths, length, dtype, packed).as_text()
    assert text.count('custom_call_target="mosaic_gpu') >= 2
    assert "all-gather" not in text
    reports = "".join(path.read_text() for path in tmp_path.glob("*ptxas*"))
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores, ", reports)]
    assert spilled and max(spilled) <= MOST_SPILLED, reports
