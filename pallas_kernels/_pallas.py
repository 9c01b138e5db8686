"""The only file that imports Pallas and its backends: an API rename there is one edit here.

What it has no words for on Hopper GPUs is in `_ptx.py`, which imports what lies beneath it.
"""

from collections.abc import Sequence

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = [
    "PER_COLUMN",
    "PER_ROW",
    "WGMMA",
    "forget_varying",
    "pl",
    "plgpu",
    "pltpu",
    "unify_varying",
    "varying_axes",
]

WGMMA = plgpu.Layout.WGMMA  # of an accumulator of Hopper's tensor cores in registers
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


def varying_axes(*arrays: jax.Array | None) -> frozenset[str]:
    """Mesh axes, inside `shard_map(check_vma=True)`, over which any of the arrays varies."""
    axes: frozenset[str] = frozenset()
    for x in arrays:
        if x is not None:
            axes |= jax.typeof(x).manual_axis_type.varying
    return axes


def unify_varying[Tree](tree: Tree, axes: Sequence[str] | frozenset[str]) -> Tree:
    """Mark every array of `tree` as varying over `axes`.

    `custom_vjp` refuses inputs that vary over different axes, and `plgpu.kernel` forgets the
    axes over which its outputs vary; both are mended by one cast.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in sorted(axes) if a not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def forget_varying(x: jax.Array) -> jax.Array:
    """`x` itself, marked as varying over no mesh axis: kernels refuse references that vary.

    What a kernel returns is marked so anyway; `unify_varying` puts it right.
    """
    return _forget_varying.bind(x)


_forget_varying = Primitive("forget_varying")
_forget_varying.def_impl(lambda x: x)
_forget_varying.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_forget_varying, lambda _, x: [x])
batching.defvectorized(_forget_varying)
