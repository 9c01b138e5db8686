"""The one comparison routine: value and every gradient of an operator against its reference."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_rms(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN and wrong shapes never pass."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape, f"shape {a.shape} != {e.shape}"
    both_inf = np.isinf(a) & (a == e)  # lse of a row without keys
    difference = np.where(both_inf, 0.0, a) - np.where(both_inf, 0.0, e)
    scale = np.linalg.norm(np.where(np.isinf(e), 0.0, e))
    error = np.linalg.norm(difference)
    return float(error if scale < 1e-30 else error / scale)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "value") -> None:
    """Assert `relative_rms` leaf by leaf."""
    leaves = jax.tree.leaves(actual)
    wanted = jax.tree.leaves(expected)
    assert len(leaves) == len(wanted), f"{what}: {len(leaves)} leaves, expected {len(wanted)}"
    for i, (a, e) in enumerate(zip(leaves, wanted, strict=True)):
        error = relative_rms(a, e)
        assert error <= tolerance, f"{what}[{i}]: relative RMS error {error:.3g} > {tolerance:.3g}"


def random_like(tree: Any, key: jax.Array) -> Any:
    """Random normal arrays of the shapes and dtypes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


def _float32(tree: Any) -> Any:
    def cast(x: Any) -> Any:
        floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float32) if floating else x

    return jax.tree.map(cast, tree)


def pullback_of(function: Callable[..., Any], wrt: Sequence[int]) -> Callable[..., Any]:
    """Jitted `(args, cotangent) -> (value, pull-back of the cotangent to args[wrt])`."""

    def run(args: Sequence[Any], cotangent: Any) -> tuple[Any, tuple[Any, ...]]:
        def of_wrt(*some: Any) -> Any:
            full = list(args)
            for i, x in zip(wrt, some, strict=True):
                full[i] = x
            return function(*full)

        out, pullback = jax.vjp(of_wrt, *(args[i] for i in wrt))
        return out, pullback(cotangent)

    return jax.jit(run)


def value_and_gradients(
    function: Callable[..., Any], args: Sequence[Any], wrt: Sequence[int], cotangent: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Value of `function(*args)` and its pull-back of `cotangent` to `args[wrt]`, in one jit."""
    return pullback_of(function, wrt)(tuple(args), cotangent)


def check_op(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    *,
    wrt: Sequence[int],
    tolerance: float,
    grad_tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Assert that `function` equals `reference` on `args`: value and gradients in `args[wrt]`.

    All outputs get random cotangents. The reference runs on float32 copies of the inputs, so a
    bfloat16 operator is measured against the exact answer to its own rounded inputs. Two runs
    must agree bit for bit.
    """
    cotangent = random_like(jax.eval_shape(function, *args), jax.random.key(seed))
    run = pullback_of(function, wrt)
    (out, grads), again = run(tuple(args), cotangent), run(tuple(args), cotangent)
    for a, b in zip(jax.tree.leaves((out, grads)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg="two runs differ")
    for i, g in zip(wrt, grads, strict=True):
        assert g.dtype == args[i].dtype, f"gradient {i} has dtype {g.dtype}, not {args[i].dtype}"
    want, want_grads = value_and_gradients(
        reference, _float32(tuple(args)), wrt, _float32(cotangent)
    )
    assert_close(out, want, tolerance)
    for i, g, w in zip(wrt, grads, want_grads, strict=True):
        assert_close(g, w, grad_tolerance or tolerance, f"gradient of argument {i}")
