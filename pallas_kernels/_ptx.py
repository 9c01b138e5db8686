"""Instructions of Hopper GPUs for which Pallas has no words. The interpreter knows none of them."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, ThreadSubset, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels._pallas import PER_ROW, WGMMA, plgpu

SCALAR = plgpu.Layout.WG_SPLAT(())
ROW_THREADS = 4  # hold a row of a WGMMA accumulator
FREE_BARRIERS = 8  # the first of the 16 named barriers that the compiler does not use itself


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def fetch_add(_, counter, before):
    """before[0] = counter; counter += 1, by one thread of the warpgroup.

    The instructions are predicated. Behind a branch that not all threads take, the compiler would
    no longer keep in uniform registers what is the same for all of them, as tensor cores need it.
    """
    utils.inline_ptx(
        "{ .reg .b32 old; @$2 atom.relaxed.gpu.global.add.u32 old, [$0], 1;"
        " @$2 st.shared.b32 [$1], old; }",
        utils.memref_ptr(counter),
        utils.memref_ptr(before),
        utils.single_thread_predicate(ThreadSubset.WARPGROUP),
        has_side_effects=True,
    )


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
def uniform(_, x):
    """x, an int32, of which the compiler now knows that all threads of a warp have the same."""
    value = utils.inline_ptx(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;",
        x.registers.item(),
        result_types=ir.IntegerType.get_signless(32),
        has_side_effects=True,
        convergent=True,
    )
    return FragmentedArray.splat(value, (), is_signed=True)


def named_barrier(operation: str, index: jax.Array, warpgroups: int) -> None:
    """ "sync" or "arrive" at the `index`th free named barrier, which so many warpgroups meet at.

    Of all barriers those that wake a warpgroup soonest.
    """

    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def meet(_, index):
        utils.inline_ptx(
            f"bar.{operation} $0, {warpgroups * utils.WARPGROUP_SIZE};",
            index.registers.item(),
            has_side_effects=True,
            convergent=True,
        )

    meet(FREE_BARRIERS + index)


def any_above(x: jax.Array, limit: float) -> jax.Array:
    """Whether something of x, float32 per row, in this warp is above the limit or not a number.

    Other warps may get another answer: what depends on it must not wait for them.
    """

    @plgpu.inline_mgpu(
        arg_types=(PER_ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR)
    )
    def vote(_, x):
        bound = f"0f{np.float32(limit).view(np.uint32):08X}"
        value = utils.inline_ptx(
            f"{{ .reg .pred p; setp.gtu.f32 p, $1, {bound}; setp.gtu.or.f32 p, $2, {bound}, p;"
            " vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }",
            *_scalars(x),
            result_types=ir.IntegerType.get_signless(32),
            has_side_effects=True,
            convergent=True,
        )
        return FragmentedArray.splat(value, (), is_signed=True)

    return vote(x) != 0


def thread_sums(x: jax.Array) -> jax.Array:
    """Per row of x, float32 [64, n], the sum of what a thread holds: each of `ROW_THREADS` its own.

    The type of the result cannot say so. Elementwise it is used as if it were the sum of a row, of
    which its values are the terms, until `row_sums`.
    """

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(x.shape[:1], x.dtype, PER_ROW)
    )
    def add(_, x):
        values = np.array(_scalars(x)).reshape(-1, 2, 2)  # of every eighth column two, in two rows
        return _per_row([_sum(values[:, row].flat) for row in range(2)], x.layout.reduce((1,)))

    return add(x)


@plgpu.inline_mgpu(
    arg_types=(PER_ROW,), return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, PER_ROW)
)
def row_sums(_, parts):
    """The sums of rows, of which each thread has a part: see `thread_sums`."""
    values: list[ir.Value] = _scalars(parts)
    for distance in (1, 2):  # to the threads of a row, which are neighbours
        values = [_sum((x, utils.shfl_bfly(x, distance))) for x in values]
    return _per_row(values, parts.layout)


def _sum(values: Iterable[ir.Value]) -> ir.Value:
    """In pairs: the chain of additions is short."""
    values = list(values)
    while len(values) > 1:
        odd = values[len(values) & ~1 :]
        values = [*map(arith.addf, values[::2], values[1::2]), *odd]
    return values[0]


def _per_row(values: list[ir.Value], layout: Any) -> FragmentedArray:
    """Of two scalars, one for each row of a thread."""
    shape = layout.registers_shape((64,))
    registers = [vector.from_elements(ir.VectorType.get((1,), x.type), [x]) for x in values]
    registers = np.array(registers, dtype=object).reshape(shape)
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _scalars(x: FragmentedArray) -> list[ir.Value]:
    """The elements of x that a thread holds."""
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for register in x.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]
