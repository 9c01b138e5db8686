"""The TPU kernels without a TPU: interpreted with race detection, and compiled ahead of time."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels._pallas import pl, pltpu
from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_dstate,
    lightning_step,
)
from pallas_kernels.lightning_attention.tiles import TpuTiles, tpu_tiles
from tests.harness import assert_close, check_op
from tests.pallas_kernels.lightning_attention.cases import (
    TOLERANCE,
    Case,
    attend,
    final_state,
    initial_cotangent,
)
from tests.topologies import TPUS, gpu_mesh, tpu_mesh

pytestmark = pytest.mark.usefixtures("strict_dtypes")
interpreted = functools.partial(
    pltpu.force_tpu_interpret_mode, pltpu.InterpretParams(detect_races=True)
)
SMALL = TpuTiles(chunk=128, block=256)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
def test_interpreted_packed_with_state(dtype):
    # Two blocks, the second with one whole and one partial chunk; one document fills a chunk.
    case = Case(400, batch=1, heads=2, dtype=dtype)
    documents = jnp.repeat(jnp.array([-1, 37, 256, 390]), jnp.array([37, 219, 134, 10]))[None]
    with interpreted():
        check_op(
            attend("tpu", tiles=SMALL),
            attend("reference"),
            (*case.draw(), documents),
            wrt=range(5),
            tolerance=TOLERANCE[dtype],
        )


def test_interpreted_shorter_than_a_chunk():
    with interpreted():
        check_op(
            attend("tpu"),
            attend("reference"),
            Case(15, batch=1, heads=2).draw()[:4],
            wrt=range(4),
            tolerance=1e-5,
        )


def test_interpreted_state_alone():
    case = Case(256, batch=1, heads=2)
    with interpreted():
        check_op(
            final_state("tpu"),
            final_state("reference"),
            (*case.draw()[1:], case.documents()),
            wrt=range(4),
            tolerance=1e-5,
        )
        q, _, do, log_decay, _ = case.draw()
        args = (q, do, log_decay, case.documents())
        got, wanted = (initial_cotangent(backend)(*args) for backend in ("tpu", "reference"))
    assert_close(got, wanted, 1e-5)


def compile_gradient(generation, dtype, width=128, length=65536, backend="auto", **options):
    """The compiled value and gradient, batch and heads sharded, of a packed call with states."""
    mesh = tpu_mesh(generation, {"data": 2, "tensor": 2})

    def run(q, k, v, log_decay, state, doc_start, do, dstate):
        def of(q, k, v, state):
            return lightning_attention(
                q,
                k,
                v,
                log_decay,
                state=state,
                doc_start=doc_start,
                return_state=True,
                backend=backend,
                **options,
            )

        out, pullback = jax.vjp(of, q, k, v, state)
        alone = lightning_dstate(q, do, log_decay, doc_start=doc_start, backend=backend)
        return out, pullback((do, dstate)), alone

    tokens, states = P("data", None, "tensor"), P("data", "tensor")
    specs = (tokens, tokens, tokens, P("tensor"), states, P("data"), tokens, states)
    outs = ((tokens, states), (tokens, tokens, tokens, states), states)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=True)
    q = (2, length, 4, width), dtype
    state = (2, 4, width, width), jnp.float32
    shapes = (q, q, q, ((4,), jnp.float32), state, ((2, length), jnp.int32), q, state)
    args = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(sharded).lower(*args).compile()


def check_compiled(compiled, dtype, width=128, length=65536, relayouts=8.1):
    text = compiled.as_text()
    for kernel in ("lightning_forward", "lightning_dq", "lightning_dkv", "lightning_dstate"):
        assert kernel in text, f"{kernel} is not in the program"
    for absent in ("while(", "all-gather", "all-to-all", "all-reduce"):
        assert absent not in text, f"{absent} is in the program"
    # One device holds 2 heads. Each of the eight arrays needs at most one relayout.
    operand = length * 2 * pl.cdiv(width, 128) * 128 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < relayouts * operand


@pytest.mark.parametrize("generation", TPUS)
def test_auto_compiles_for_tpus(generation):
    check_compiled(compile_gradient(generation, jnp.bfloat16), jnp.bfloat16)


def test_compiles_with_64_bit_types_ragged_narrow_float32():
    with jax.enable_x64(True):
        compiled = compile_gradient("v5e", jnp.float32, width=64, length=65000)
    check_compiled(compiled, jnp.float32, width=64, length=65000)


def test_nothing_is_transposed_around_the_kernels():
    mesh = tpu_mesh("v5e", {"x": 1})

    def layer(x, w):
        q, k, v = (y.reshape(2, 16384, 4, 128) for y in jnp.split(x @ w, 3, axis=2))
        return lightning_attention(jax.nn.silu(q), jax.nn.silu(k), v, -jnp.ones(4)).sum()

    shapes = ((2, 16384, 512), (512, 1536))
    replicated = NamedSharding(mesh, P())
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=replicated) for s in shapes]
    text = jax.jit(jax.grad(layer, argnums=(0, 1))).lower(*args).compile().as_text()
    assert "bf16[2,16384,512]" in text
    entry = text[text.index("ENTRY") :]
    assert "16384,4,128]" not in entry, "an array is materialised with its heads apart"


def test_vmap_compiles_with_decays_mapped_too():
    replicated = NamedSharding(tpu_mesh("v5e", {"x": 1}), P())
    shapes = ((3, 2, 300, 4, 128), jnp.bfloat16), ((3, 4), jnp.float32), ((3, 2, 300), jnp.int32)
    args = [jax.ShapeDtypeStruct(*x, sharding=replicated) for x in shapes]

    @jax.vmap
    def run(x, log_decay, doc_start):
        return lightning_attention(x, x, x, log_decay, doc_start=doc_start)

    assert "lightning_forward" in jax.jit(run).lower(*args).compile().as_text()


@pytest.mark.parametrize("mesh", [functools.partial(tpu_mesh, "v5e"), gpu_mesh], ids=["tpu", "gpu"])
def test_a_step_reads_and_writes_the_state_once(mesh):
    replicated = NamedSharding(mesh({"x": 1}), P())
    token, state = ((8, 16, 128), jnp.bfloat16), ((8, 16, 128, 128), jnp.float32)
    args = [
        jax.ShapeDtypeStruct(*x, sharding=replicated)
        for x in (token, token, token, ((16,), jnp.float32), state)
    ]
    compiled = jax.jit(lightning_step, donate_argnums=4).lower(*args).compile()
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    made = re.findall(r"f32\[8,16,128,128\]\S*[^=]*? (\w+)\(", entry)
    assert sorted(made) == ["fusion", "parameter"], f"operations on the state: {made}"
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("width", [96, 256, 512])
@pytest.mark.parametrize("generation", TPUS)
def test_compiles_everywhere(generation, width, dtype, x64):
    with jax.enable_x64(x64):
        compiled = compile_gradient(generation, dtype, width=width, length=65000)
    # There one array waits, padded, for its relayout.
    relayouts = 9.1 if (generation, width, dtype) == ("v5p", 96, jnp.float32) else 8.1
    check_compiled(compiled, dtype, width=width, length=65000, relayouts=relayouts)


def test_default_tiles_follow_the_target():
    with jax.sharding.use_abstract_mesh(tpu_mesh("v6e", {"x": 1}).abstract_mesh):
        assert tpu_tiles(128, jnp.bfloat16) == TpuTiles(chunk=256, block=1024)
    with jax.sharding.use_abstract_mesh(tpu_mesh("v5e", {"x": 1}).abstract_mesh):
        assert tpu_tiles(512, jnp.float32) == TpuTiles(chunk=128, block=128)


def test_refusals_name_the_reason():
    q, k, v, log_decay, _ = Case(8, dtype=jnp.float16).draw()
    with pytest.raises(NotImplementedError, match="bfloat16 or float32, not float16"):
        lightning_attention(q, k, v, log_decay, backend="tpu")
    q, k, v, log_decay, _ = Case(8, key_width=600).draw()
    with pytest.raises(NotImplementedError, match="exceed 512"):
        lightning_attention(q, k, v, log_decay, backend="tpu")


def test_tiles_are_validated():
    with pytest.raises(ValueError, match="multiple of the 128 lanes"):
        TpuTiles(chunk=64, block=128)
    with pytest.raises(ValueError, match="multiple of chunk=128"):
        TpuTiles(chunk=128, block=200)
