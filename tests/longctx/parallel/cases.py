"""Operands of sharded operators, and one routine that runs them: on a mesh, or on one device."""

import jax
import jax.numpy as jnp
import numpy as np

from longctx.parallel.layout import Layout
from longctx.parallel.mesh import make_mesh
from tests.harness import relative_rms

# Results do not depend on it, and compiling is nearly all that these tests do.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw(shapes, dtype=np.float32, seed=0):
    """Random normal arrays, rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def documents(batch, length, cuts, seed=0):
    """`doc_start` [B, T] of rows packed with up to `cuts + 1` documents of random lengths."""
    rng = np.random.default_rng(seed)
    start = np.zeros((batch, length), np.int32)
    for row in start:
        for cut in sorted(rng.integers(1, length, cuts)):
            row[cut:] = cut
    return start


def value_and_gradients(function, args, cotangents, compiler_options=QUICK_COMPILE):
    """Flat list: outputs of `function(*args)` and the cotangents' pull-back."""

    def run(args, cotangents):
        out, pullback = jax.vjp(function, *args)
        return [*jax.tree.leaves(out), *pullback(cotangents)]

    return jax.jit(run, compiler_options=compiler_options)(args, cotangents)


def on_mesh(
    function,
    args,
    cotangents,
    layout: Layout,
    devices: int,
    time_axis,
    compiler_options=QUICK_COMPILE,
    **mesh,
):
    """`value_and_gradients` over `devices` along seq, in `layout`; results in position order.

    `time_axis` gives, for every argument and every result, its axis of time, or None.
    """
    outputs = len(jax.tree.leaves(cotangents))
    to, back = time_axis[: len(args)], time_axis[len(args) :]

    def lay_out(x, axis):
        return x if axis is None else layout.apply(x, axis)

    with jax.set_mesh(make_mesh(seq=devices, **mesh)):
        got = value_and_gradients(
            function,
            tuple(map(lay_out, args, to)),
            jax.tree.unflatten(
                jax.tree.structure(cotangents),
                map(lay_out, jax.tree.leaves(cotangents), back[:outputs]),
            ),
            compiler_options,
        )
        got = jax.tree.map(np.asarray, got)
    assert len(got) == len(back)
    return [x if a is None else layout.invert(x, a) for x, a in zip(got, back, strict=True)]


def errors(got, want):
    return [relative_rms(a, e) for a, e in zip(got, want, strict=True)]
