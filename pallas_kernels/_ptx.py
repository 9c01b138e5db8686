"""Instructions of Hopper GPUs for which Pallas has no words. The interpreter knows none of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray, ThreadSubset, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels._pallas import plgpu

WGMMA = plgpu.Layout.WGMMA
SCALAR = plgpu.Layout.WG_SPLAT(())
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


@plgpu.inline_mgpu(arg_types=(WGMMA.reduce(1),))
def settle(_, x):
    """Nothing that follows begins before x is known: float32 per row, not negative.

    The compiler moves a wait for the tensor cores ahead of what does not need it, though that
    could be done meanwhile; but not out of a loop, which this one never repeats.
    """
    utils.inline_ptx(
        "{ .reg .pred p, q; again: setp.lt.f32 p, $0, 0f00000000;"
        " setp.lt.or.f32 p, $1, 0f00000000, p; vote.sync.any.pred q, p, -1; @q bra again; }",
        *_scalars(x),
        has_side_effects=True,
        convergent=True,
    )


def rescaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x times a factor per row, both float32; a warp whose rows all have the factor 1 skips it."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, WGMMA),
    )
    def multiply(_, x, factors):
        int32 = ir.IntegerType.get_signless(32)
        some = utils.inline_ptx(
            "{ .reg .pred p, q; setp.neu.f32 p, $1, 0f3F800000;"
            " setp.neu.or.f32 p, $2, 0f3F800000, p; vote.sync.any.pred q, p, -1;"
            " selp.b32 $0, 1, 0, q; }",
            *_scalars(factors),
            result_types=int32,
            has_side_effects=True,
            convergent=True,
        )
        given = list(x.registers.flat)
        branch = scf.IfOp(
            arith.cmpi(arith.CmpIPredicate.ne, some, utils.c(0, int32)),
            [register.type for register in given],
            has_else=True,
        )
        with ir.InsertionPoint(branch.then_block):
            product = x * factors.broadcast_in_dim(x.shape, (0,), x.layout)
            scf.YieldOp(list(product.registers.flat))
        assert branch.else_block is not None
        with ir.InsertionPoint(branch.else_block):
            scf.YieldOp(given)
        registers = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return multiply(x, factors)


def _scalars(x: FragmentedArray) -> list[ir.Value]:
    """The elements of x that a thread holds."""
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for register in x.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]
