"""The Hopper kernels compiled ahead of time: registers, memory, and what crosses devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.flash_attention import Pieces, block_forward, flash_attention
from tests.ptxas import ptxas as ptxas
from tests.topologies import gpu_mesh

ROWS, NUMBERS = P("data", None, "tensor"), P("data", "tensor")


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes of the call of one device of four, and what is static about it."""

    width: int = 128
    length: int = 1000
    dtype: Any = jnp.bfloat16
    packed: bool = False
    axis_type: AxisType = AxisType.Auto
    options: tuple[tuple[str, Any], ...] = ()

    def compile(self):
        """Value, lse and every gradient; batch over two devices, heads over two."""
        mesh = gpu_mesh({"data": 2, "tensor": 2}, self.axis_type)

        def gradients(q, k, v, lo, do, dlse):
            run = functools.partial(flash_attention, lo=lo, return_lse=True, **dict(self.options))
            out, pullback = jax.vjp(run, q, k, v)
            return out, pullback((do, dlse))

        def of(spec, *sizes, dtype=self.dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

        q, k = (of(ROWS, 2, self.length, heads, self.width) for heads in (4, 2))
        lo = of(P("data"), 2, self.length, dtype=jnp.int32) if self.packed else None
        dlse = of(NUMBERS, 2, 4, self.length, dtype=jnp.float32)
        in_specs = (ROWS, ROWS, ROWS, P("data"), ROWS, NUMBERS)
        out_specs = ((ROWS, NUMBERS), (ROWS,) * 3)
        # A user's shard_map, which checks over which axes everything varies.
        run = jax.shard_map(gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(run).lower(q, k, k, lo, q, dlse).compile()


CASES = {  # with the bytes that a thread of the worst kernel may spill
    "width 128, a million tokens": (Call(length=2**20), 100),
    "width 64, all keys": (Call(64, options=(("causal", False),)), 100),
    "width 64, packed": (Call(64, packed=True, axis_type=AxisType.Explicit), 250),
    "width 96, float16": (Call(96, dtype=jnp.float16), 100),
    "width 128, packed, deterministic, Explicit": (
        Call(packed=True, axis_type=AxisType.Explicit, options=(("deterministic", True),)),
        100,
    ),
    "width 128, a million tokens, packed": (Call(length=2**20, packed=True), 100),
    "width 192, window, soft cap": (Call(192, options=(("window", 300), ("soft_cap", 9.0))), 100),
    "width 256, float16": (Call(256, dtype=jnp.float16), 100),
    "width 256, packed": (Call(256, packed=True), 400),
}


@pytest.mark.parametrize(
    "name", [n if i == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(CASES)]
)
def test_compiles_for_h100(name, ptxas):
    """Too much shared memory is an error; little is spilled; nothing is gathered or quadratic."""
    call, most_spilled = CASES[name]
    compiled = call.compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') >= 2
    for kind in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "while("):
        assert kind not in text, kind
    assert max(ptxas.spilled()) <= most_spilled, ptxas.spilled()
    # Of one device: float32 dq, and what pads q, k, v, o, do and their gradients.
    padded = 2 * call.length * (64 * -(-call.width // 64)) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * padded


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
def test_pieces_are_read_where_they_lie(width, ptxas):
    """The joint block of a ring: no keys are joined, no rows are cut off, nothing is spilled."""
    place = NamedSharding(gpu_mesh({"x": 1}), P())

    def of(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def attend(q, k, k_other, order, hi, o, lse):
        keys = Pieces((k, k_other), order)
        return block_forward(q, keys, keys, first_row=128, hi=hi, carry=(o, lse))

    x, numbers = of(1, 2048, 2, width), functools.partial(of, dtype=jnp.float32)
    compiled = jax.jit(attend).lower(
        x, x, x, of(4, dtype=jnp.int32), of(1, 1920, dtype=jnp.int32),
        numbers(1, 768, 2, width), numbers(1, 2, 768),  # behind 1152 rows: whole tiles
    ).compile()  # fmt: skip
    assert max(ptxas.spilled()) <= 100, ptxas.spilled()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2048 * width  # of a bfloat16 head


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_nothing_is_copied_around_the_forward_kernel(width):
    """At a length that is no whole number of tiles: TMA itself stops at the last row."""
    replicated = NamedSharding(gpu_mesh({"x": 1}), P())
    x = jax.ShapeDtypeStruct((1, 8200, 4, width), jnp.bfloat16, sharding=replicated)
    compiled = jax.jit(flash_attention).lower(x, x, x).compile()
    numbers = 8448 * 4 * 4  # lse, with rows to whole tiles
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * numbers
