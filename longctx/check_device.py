"""`longctx check-device`: are the kernels right on this device, and how fast are they?"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from longctx.cli import parse
from longctx.errors import UserError
from longctx.provenance import write_rows
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.lightning_attention import alibi_log_decay, lightning_attention

# Relative root-mean-square errors that 16-bit products with float32 sums stay below.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """Compare every kernel with its definition on this device, and time it."""

    # Where the rows go.
    out: Path = Path("runs/check-device.jsonl")
    # Tokens of the timed calls.
    tokens: int = 16384


@dataclasses.dataclass(frozen=True)
class Check:
    """One configuration of an operator.

    Attributes:
      operator: takes q, k, v and `backend=`.
      shapes: of q, k and v, without the leading batch and length.
    """

    name: str
    operator: Callable[..., Any]
    shapes: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    length: int = 1000

    def draw(self, length: int, batch: int = 2) -> list[jax.Array]:
        """Random q, k, v."""
        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        return [
            jax.random.normal(key, (batch, length, *shape)).astype(self.dtype)
            for key, shape in zip(keys, self.shapes, strict=True)
        ]


def _checks() -> list[Check]:
    def lightning(packed: bool = False, heads: int = 4) -> Callable[..., Any]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, backend: str) -> Any:
            starts = _documents(q.shape) if packed else None
            decay = alibi_log_decay(heads, 0, 2)
            return lightning_attention(
                q, k, v, decay, doc_start=starts, return_state=True, backend=backend
            )

        return run

    def flash(packed: bool = False, **options: Any) -> Callable[..., Any]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, backend: str) -> Any:
            extra = dict(options)
            if packed:
                row = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
                extra |= {"lo": _documents(q.shape), "hi": jnp.broadcast_to(row + 1, q.shape[:2])}
            return flash_attention(q, k, v, backend=backend, **extra)

        return run

    checks = []
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (64, 128):
            same = ((4, width),) * 3
            checks += [
                Check(f"lightning, width {width}", lightning(), same, dtype),
                Check(f"flash causal, width {width}", flash(), same, dtype),
            ]
    grouped = ((4, 128), (2, 128), (2, 128))
    return [
        *checks,
        Check("lightning, D 256, E 128", lightning(), ((4, 256), (4, 256), (4, 128))),
        Check("lightning, width 96", lightning(), ((4, 96),) * 3),
        Check("lightning, packed", lightning(packed=True), ((4, 128),) * 3),
        Check("flash, grouped heads", flash(), grouped),
        Check("flash, window", flash(window=100), ((4, 128),) * 3),
        Check("flash, soft cap", flash(soft_cap=20.0), ((4, 128),) * 3),
        Check("flash, packed", flash(packed=True, causal=True), grouped),
        Check("flash, width 256", flash(), ((4, 256),) * 3),
    ]


def _documents(shape: Sequence[int], size: int = 300) -> jax.Array:
    """Documents of `size` tokens: where each token's begins."""
    position = jnp.arange(shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(position // size * size, (shape[0], shape[1]))


def check_device(arguments: Sequence[str]) -> None:
    """`longctx check-device [--out FILE]`."""
    options = parse(CheckOptions, "check-device", arguments)
    console = Console(stderr=True)
    rows = [_row(check, options.tokens) for check in track(_checks(), "checks", console=console)]
    write_rows(options.out, rows)
    table = Table(title=f"{jax.devices()[0].device_kind}: {options.out}")
    for column in ("check", "dtype", "error", "gradients", "ms", "ms with gradients"):
        table.add_column(column, justify="left" if column == "check" else "right")
    for row in rows:
        table.add_row(
            row["check"] if row["right"] else f"[red]{row['check']}: WRONG",
            row["dtype"],
            f"{row['error']:.1e}",
            f"{row['gradient_error']:.1e}",
            f"{row['forward_ms']:.3f}",
            f"{row['forward_backward_ms']:.3f}",
        )
    Console().print(table)
    wrong = [f"{row['check']} ({row['dtype']})" for row in rows if not row["right"]]
    if wrong:
        raise UserError(f"wrong on this device: {', '.join(wrong)}; see {options.out}")


def _row(check: Check, tokens: int) -> dict[str, Any]:
    def both(backend: str, arrays: Sequence[jax.Array]) -> tuple[Any, Any]:
        out, pullback = jax.vjp(lambda *a: check.operator(*a, backend=backend), *arrays)
        leaves, tree = jax.tree.flatten(out)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        # Rounded like the inputs, so that operator and definition get the same cotangent.
        cotangent = [
            jax.random.normal(k, x.shape).astype(check.dtype).astype(x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return out, pullback(jax.tree.unflatten(tree, cotangent))

    arrays = check.draw(check.length)
    exact = [x.astype(jnp.float32) for x in arrays]
    ours = jax.jit(lambda *a: both("auto", a))(*arrays)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda *a: both("reference", a))(*exact)
    error, gradient_error = (_worst(a, b) for a, b in zip(ours, wanted, strict=True))
    long = check.draw(tokens, batch=1)
    forward = jax.jit(lambda *a: check.operator(*a, backend="auto"))
    return {
        "check": check.name,
        "dtype": check.dtype,
        "error": error,
        "gradient_error": gradient_error,
        "tolerance": TOLERANCE[check.dtype],
        "right": max(error, gradient_error) <= TOLERANCE[check.dtype],
        "tokens": tokens,
        "forward_ms": _milliseconds(forward, long),
        "forward_backward_ms": _milliseconds(jax.jit(lambda *a: both("auto", a)), long),
    }


def _worst(ours: Any, wanted: Any) -> float:
    def error(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return max(float(x) for x in jax.tree.leaves(jax.tree.map(error, ours, wanted)))


def _milliseconds(function: Callable[..., Any], arrays: Sequence[jax.Array]) -> float:
    """Of one call, the mean over ten queued ones."""
    jax.block_until_ready(function(*arrays))
    began = time.perf_counter()
    for _ in range(10):
        out = function(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) * 100
