"""`longctx check-device`: are the kernels right on this device, and how fast are they?"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longctx.cli import parse
from longctx.device.cases import Check, checks
from longctx.device.programs import compile_all
from longctx.errors import UserError
from longctx.provenance import write_rows

# Relative root-mean-square errors that 16-bit products with float32 sums stay below.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}
KERNELS = {"gpu": "gpu", "tpu": "tpu"}  # backend by platform; elsewhere plain JAX


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """Compare every kernel with its definition on this device, and time it."""

    # Where the rows go.
    out: Path = Path("runs/check-device.jsonl")
    # Only checks whose name contains this.
    only: str = ""
    # Tokens of the compared calls, in each of two rows.
    length: int = 1000
    # Tokens of the timed calls; 0: 16384, or 1024 on a CPU.
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.tokens < 0:
            raise ValueError(f"length={self.length} must be at least 1, tokens={self.tokens} 0")


def check_device(arguments: Sequence[str]) -> None:
    """`longctx check-device [--out FILE]`: fails if anything is wrong, or does not run."""
    options = parse(CheckOptions, "check-device", arguments)
    chosen = [check for check in checks() if options.only in check.name]
    if not chosen:
        raise UserError(f"no check has {options.only!r} in its name")
    if not options.tokens:
        tokens = 1024 if jax.default_backend() == "cpu" else 16384
        options = dataclasses.replace(options, tokens=tokens)
    console = Console(stderr=True)
    ready = [_prepare(check, options) for check in chosen]
    _compile(ready, console)
    rows = []
    for programs in track(ready, "check", console=console):
        rows.append(_row(programs, options))
        write_rows(options.out, rows)
    Console().print(_table(rows, options.out))
    wrong = [f"{row['check']} ({row['dtype']})" for row in rows if not row["right"]]
    if wrong:
        raise UserError(f"wrong on this device: {', '.join(wrong)}; see {options.out}")


def _table(rows: Sequence[dict[str, Any]], out: Path) -> Table:
    table = Table(title=f"{jax.devices()[0].device_kind}: {out}")
    for column in ("check", "dtype", "backend", "error", "gradients", "ms", "ms with gradients"):
        table.add_column(column, justify="right" if column.startswith("ms") else "left")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            row["check"] if row["right"] else f"[red]{row['check']}: {row['wrong']}",
            row["dtype"],
            row["backend"],
            shown(row.get("error"), ".1e"),
            shown(row.get("gradient_error"), ".1e"),
            shown(row.get("forward_ms"), ".3f"),
            shown(row.get("forward_backward_ms"), ".3f"),
        )
    return table


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a check compiles: results of ours and of the definition, and calls to time.

    Each is lowered by its function here, and stands in `compiled` afterwards.
    """

    check: Check
    backend: str  # what backend="auto" takes here
    refusal: str | None  # why that is not this platform's own kernels
    lowerings: dict[str, Callable[[], jax.stages.Lowered]]
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """Why there are none."""
        failures = (x for x in self.compiled.values() if isinstance(x, BaseException))
        return next(map(str, failures), None)


FAILURES = (RuntimeError, TypeError, ValueError)  # what compilers and kernels raise


def _prepare(check: Check, options: CheckOptions) -> Programs:
    few = jax.eval_shape(lambda: check.draw(options.length, batch=2))
    many = jax.eval_shape(lambda: check.draw(options.tokens, batch=1))
    exact = [jax.ShapeDtypeStruct(x.shape, jnp.float64) for x in few]
    backend, refusal = _backend(check, few)

    def both(*arrays: Any) -> Any:
        return _both(check, backend, arrays)

    def definition() -> jax.stages.Lowered:
        with jax.enable_x64(True):
            return jax.jit(lambda *a: _both(check, "reference", a)).lower(*exact)

    lowerings = {"wanted": definition, "found": functools.partial(jax.jit(both).lower, *few)}
    if check.timed:
        forward = functools.partial(check.operator, backend)
        lowerings["forward"] = functools.partial(jax.jit(forward).lower, *many)
        lowerings["both"] = functools.partial(jax.jit(both).lower, *many)
    return Programs(check, backend, refusal, lowerings)


def _compile(checks: Sequence[Programs], console: Console) -> None:
    """Nothing compiles any more when the clock runs."""
    todo = [(programs, name) for programs in checks for name in programs.lowerings]
    lowerings = (
        programs.lowerings[name] for programs, name in track(todo, "compile", console=console)
    )
    for (programs, name), compiled in zip(todo, compile_all(lowerings, FAILURES), strict=True):
        programs.compiled[name] = compiled


def _backend(check: Check, arrays: Sequence[Any]) -> tuple[str, str | None]:
    own = KERNELS.get(jax.default_backend(), "xla")
    try:
        jax.eval_shape(lambda *a: check.operator(own, *a), *arrays)
    except NotImplementedError as refusal:
        return "xla", str(refusal)
    except FAILURES:  # which compiling will report
        return own, None
    return own, None


def _row(programs: Programs, options: CheckOptions) -> dict[str, Any]:
    """What was found: errors, times, and if it is not right, what is `wrong`."""
    check = programs.check
    row = {
        "check": check.name,
        "dtype": check.dtype,
        "backend": programs.backend,
        "refusal": programs.refusal,
        "tolerance": TOLERANCE[check.dtype],
        "length": options.length,
    }
    failure = programs.failure
    if failure is None:
        try:
            return row | _errors(programs, options.length) | _times(programs, options.tokens)
        except FAILURES as error:
            failure = str(error)
    return row | {"right": False, "wrong": f"does not run: {failure[:500]}"}


def _errors(programs: Programs, length: int) -> dict[str, Any]:
    check, compiled = programs.check, programs.compiled
    arrays = check.draw(length, batch=2)
    ours, again = compiled["found"](*arrays), compiled["found"](*arrays)
    with jax.enable_x64(True):  # sums of single precision would be less exact than ours
        wanted = compiled["wanted"](*(x.astype(jnp.float64) for x in arrays))
    found = {
        name: worst_error(a, b)
        for name, a, b in zip(("error", "gradient_error"), ours, wanted, strict=True)
        if check.gradients or name == "error"
    }
    # Only reductions in GMEM may come in another order; flash attention offers to do without.
    repeats = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True)
    )
    must_repeat = "flash" not in check.name or "deterministic" in check.name
    wrong = [f"{name} {e:.1e}" for name, e in found.items() if not e <= TOLERANCE[check.dtype]]
    if must_repeat and not repeats:
        wrong.append("two runs differ")
    return {**found, "repeats": repeats, "right": not wrong, "wrong": ", ".join(wrong) or None}


def _both(check: Check, backend: str, arrays: Sequence[jax.Array]) -> tuple[Any, Any]:
    """Outputs, and the gradients of all arrays for random cotangents of all outputs."""
    if not check.gradients:
        return check.operator(backend, *arrays), ()
    out, pullback = jax.vjp(lambda *a: check.operator(backend, *a), *arrays)
    leaves, tree = jax.tree.flatten(out)
    # With this key the gradients of the decays, sums that cancel, do not vanish by chance.
    keys = jax.random.split(jax.random.key(8), len(leaves))
    # Rounded like the inputs, so that operator and definition get the same cotangent; by a cast
    # alone XLA need not round.
    number = jnp.finfo(check.dtype)
    cotangent = [
        lax.reduce_precision(
            jax.random.normal(key, x.shape, jnp.float32), number.nexp, number.nmant
        ).astype(x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return out, pullback(jax.tree.unflatten(tree, cotangent))


def worst_error(ours: Any, wanted: Any) -> float:
    """The largest relative RMS error of any array; NaN, never small, if one is not finite."""

    def error(a: jax.Array, b: jax.Array) -> float:
        found, exact = (np.asarray(x, np.float64) for x in (a, b))
        if found.shape != exact.shape:
            return float("nan")
        same_infinity = np.isinf(exact) & (found == exact)  # the lse of a row that sees nothing
        found, exact = (np.where(same_infinity, 0.0, x) for x in (found, exact))
        size, gap = np.linalg.norm(exact), np.linalg.norm(found - exact)
        if not np.isfinite(gap):
            return float("nan")
        return float(gap / (size if size > 0 else 1.0))

    return float(np.max(jax.tree.leaves(jax.tree.map(error, ours, wanted))))


def _times(programs: Programs, tokens: int) -> dict[str, float]:
    if not programs.check.timed:
        return {}
    arrays = programs.check.draw(tokens, batch=1)
    return {
        "tokens": tokens,
        "forward_ms": milliseconds(programs.compiled["forward"], arrays),
        "forward_backward_ms": milliseconds(programs.compiled["both"], arrays),
    }


def milliseconds(function: Callable[..., Any], arrays: Sequence[jax.Array]) -> float:
    """Of one call, the mean over ten queued ones."""
    jax.block_until_ready(function(*arrays))
    began = time.perf_counter()
    for _ in range(10):
        out = function(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) * 100
