"""Blocks of a ring, which hand on keys and the sums of their gradients to the next device.

    fwd   o and lse, and the k and v of the device before
    bwd   dq; the dk and dv, of `spec.out_dtype`, of the keys that the device before had: what it
          was given in `accumulate` and its own part; and, if `keys_travel`, those keys

The kernels of one backend send by themselves; after those of the others XLA moves the arrays.
"""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from pallas_kernels.flash_attention import gpu, reference, tpu, xla
from pallas_kernels.flash_attention.tiles import Ring, Spec


def _then_send(module: ModuleType) -> SimpleNamespace:
    """A backend whose kernels do not send."""
    return SimpleNamespace(
        unsupported=module.unsupported,
        fwd=functools.partial(_forward, module.fwd),
        bwd=functools.partial(_backward, module.bwd),
    )


def _forward(fwd: Callable[..., Any], q: Array, k: Array, v: Array, *rest: Any, ring: Ring, **how):
    return *fwd(q, k, v, *rest, **how), *_send(ring, (k, v))


def _backward(
    bwd: Callable[..., Any],
    q: Array,
    k: Array,
    v: Array,
    *rest: Any,
    ring: Ring,
    keys_travel: bool,
    spec: Spec,
    **how,
):
    dq, *gradients = bwd(q, k, v, *rest, spec=spec, **how)
    gradients = [x.astype(spec.out_dtype) for x in gradients]
    return dq, *_send(ring, (*gradients, *((k, v) if keys_travel else ())))


def _send[Tree](ring: Ring, arrays: Tree) -> Tree:
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, ring.pairs()), arrays)


def _backward_on_gpu(*args: Any, spec: Spec, tiles: Any, **how: Any) -> tuple[Array, ...]:
    run = gpu.bwd if gpu.sends(spec, tiles) else functools.partial(_backward, gpu.bwd)
    return run(*args, spec=spec, tiles=tiles, **how)


RING_BACKENDS = {
    "reference": _then_send(reference),
    "xla": _then_send(xla),
    "tpu": _then_send(tpu),
    "gpu": SimpleNamespace(unsupported=gpu.unsupported, fwd=gpu.fwd, bwd=_backward_on_gpu),
}
