"""Speed of the tensorized operator by length, against dense attention.

Claim (2410.20926, abstract): 11 times as fast as full attention with FlashAttention-2 at 128K
tokens; whether of the kernel, the layer or decoding is not known. The pairs computed allow 102.
Command: longctx reproduce experiments/tensorized/operator_speed.py --scale paper
Expected: at 131072 = 512 x 256 at least 20 times as fast as dense, forward and forward + backward;
time nearly linear in the length. One sequence, 32 query and 8 key/value heads of 128, bf16.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._passes import with_gradients
from experiments.bench._timing import time_ms
from longctx.attention.tensorized import tensorized_attention
from longctx.device.programs import compile_all
from longctx.reproduce import Row
from pallas_kernels.flash_attention import flash_attention

SHAPES = {  # fast x slow, by length
    "smoke": {64: (8, 8)},
    "small": {8192: (128, 64), 32768: (256, 128), 131072: (512, 256)},
    "paper": {
        8192: (128, 64), 16384: (128, 128), 32768: (256, 128), 65536: (256, 256),
        131072: (512, 256), 262144: (512, 512), 524288: (1024, 512), 1048576: (1024, 1024),
    },
}  # fmt: skip
HEADS = {"smoke": (2, 1, 16), "small": (32, 8, 128), "paper": (32, 8, 128)}
DENSE_UP_TO = 131072  # beyond it dense attention takes seconds and is left out
BIAS = 4.0


@dataclasses.dataclass(frozen=True)
class OperatorSpeed:
    """Milliseconds of one operator call, by length."""

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Time forward, and forward + backward up to `DENSE_UP_TO`; all is compiled first."""
        del runs  # nothing is trained
        plan = [
            (length, dims, name, operator)
            for length, dims in SHAPES[scale].items()
            for name, operator in _operators(length, dims, HEADS[scale][0]).items()
        ]
        programs = iter(
            compile_all(
                lower
                for length, _, _, operator in plan
                for lower in _lowerings(length, operator, HEADS[scale])
            )
        )
        for length, dims, name, _ in plan:
            keys = jax.random.split(jax.random.key(0), 4)[: 4 if length <= DENSE_UP_TO else 3]
            q, k, v, *do = (  # do takes room that the longest need
                jax.random.normal(key, x.shape, x.dtype)
                for key, x in zip(keys, _types(length, HEADS[scale]), strict=False)
            )
            row: dict[str, Any] = {"operator": name, "length": length, "dims": list(dims)}
            row["forward_ms"] = time_ms(next(programs), q, k, v, batches=3)
            row["forward_backward_ms"] = None
            if length <= DENSE_UP_TO:
                row["forward_backward_ms"] = time_ms(next(programs), q, k, v, *do, batches=3)
            yield row

    def table(self, rows: Sequence[Row]) -> str:
        """A row per length."""
        cells = {(r["operator"], r["length"]): r for r in rows}
        lines = [
            f"# Tensorized attention, one call on {rows[0]['device']}",
            "",
            "| length | dims | forward, ms | dense / this | forward + backward, ms | "
            "dense / this | paper |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            if r["operator"] == "dense":
                continue
            shown = []
            for column in ("forward_ms", "forward_backward_ms"):
                dense = cells.get(("dense", r["length"]), {}).get(column)
                shown.append("" if r[column] is None else f"{r[column]:.3f}")
                shown.append("" if dense is None else f"{dense / r[column]:.1f}")
            paper = "11 (of what is not known)" if r["length"] == 131072 else ""
            dims = " x ".join(map(str, r["dims"]))
            lines.append(f"| {r['length']} | {dims} | {' | '.join(shown)} | {paper} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Forward time by length."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="sequence length", ylabel="ms, forward")
        for name in dict.fromkeys(r["operator"] for r in rows):
            ours = [(r["length"], r["forward_ms"]) for r in rows if r["operator"] == name]
            axes.plot(*zip(*ours, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _operators(length: int, dims: tuple[int, ...], heads: int) -> dict[str, Callable[..., Any]]:
    bias = jnp.full((1, heads), BIAS)
    found = {"tensorized": functools.partial(tensorized_attention, dims=dims, self_bias=bias)}
    return found | ({"dense": flash_attention} if length <= DENSE_UP_TO else {})


def _types(length: int, heads: tuple[int, int, int]) -> list[jax.ShapeDtypeStruct]:
    """Of q, k, v and do."""
    query, key, width = heads
    shapes = [(1, length, h, width) for h in (query, key, key, query)]
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def _lowerings(
    length: int, operator: Callable[..., Any], heads: tuple[int, int, int]
) -> Iterator[Callable[[], jax.stages.Lowered]]:
    q, k, v, do = _types(length, heads)
    yield functools.partial(jax.jit(operator).lower, q, k, v)
    if length <= DENSE_UP_TO:
        yield functools.partial(jax.jit(with_gradients(operator)).lower, q, k, v, do)


EXPERIMENT = OperatorSpeed()
