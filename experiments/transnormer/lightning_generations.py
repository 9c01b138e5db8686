"""Lightning Attention-2 against Lightning Attention-1 and softmax attention, one call, by length.

Claim (2401.04658, table 1, 0.4B, 2 x A100-80G): from 1K to 92K tokens models with LA2 keep their
speed, 38615 to 38596 tokens/s a GPU, with LA1 fall from 41789 to 6012, LLaMA with FlashAttention-2
from 35931 to 4078; LA1 is the fastest up to 2K tokens, LA2 from 4K.
Command: longctx reproduce experiments/transnormer/lightning_generations.py --scale paper
Expected: time per token of LA2 flat, of the others growing with the length; memory linear for all.

LA1 tiles the left product (q k^T) v and keeps no state. Here it is plain JAX: that its time grows
with the length is its algorithm's doing, from which length on LA2 is faster is not. Shapes are
those of the milliseconds that the authors publish beside their kernels, 4 x 32 heads of 128.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.bench._lightning_peers import FORWARD, INPUTS, Shape
from experiments.bench._passes import with_gradients
from experiments.bench._timing import time_ms
from longctx.device.programs import bytes_needed, compile_all
from longctx.figures import length_axis, tidy
from longctx.reproduce import Row
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.lightning_attention import lightning_attention

# Milliseconds, forward and backward, in the README of OpenNLPLab/lightning-attention: 4 rows,
# 32 heads of 128, bfloat16, on a GPU that it does not name.
PUBLISHED = {
    "LA2": {
        512: (0.35, 1.17), 1024: (0.59, 2.33), 2048: (1.13, 4.66), 4096: (2.24, 9.31),
        8192: (4.41, 18.62), 16384: (8.83, 37.21), 32768: (17.66, 74.59),
    },
    "FlashAttention-2": {
        512: (0.09, 0.40), 1024: (0.23, 0.96), 2048: (0.75, 2.74), 4096: (2.74, 8.89),
        8192: (10.39, 31.99), 16384: (40.57, 121.69), 32768: (162.90, 470.67),
    },
}  # fmt: skip
BLOCK = 512  # tokens of LA1's tiles

HEADS = functools.partial(Shape, 4, heads=32)
SHAPES = {
    "smoke": [Shape(1, length, heads=2, width=16, dtype=jnp.float32) for length in (64, 128)],
    "small": [HEADS(length) for length in (1024, 4096, 16384)],
    "paper": [HEADS(length) for length in PUBLISHED["LA2"]],
}


def left_product(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    log_decay: Float[Array, "H"],
    block: int = BLOCK,
) -> Float[Array, "B T H E"]:
    """Lightning Attention-1: o_t = sum over s <= t of exp(log_decay)^(t-s) (q_t . k_s) v_s.

    By tiles of `block` tokens, which the length must be a multiple of: those of later keys are
    left out, and nothing is carried from tile to tile. Not differentiable: see `left_gradients`.
    """
    batch, length, heads, _ = q.shape
    block = min(block, length)
    queries, keys, values = (
        jnp.moveaxis(x.reshape(batch, length // block, block, heads, -1), 1, 0) for x in (q, k, v)
    )
    t = jnp.arange(block)

    def rows(n: Array) -> Array:
        def add(j: Array, o: Array) -> Array:
            distance = ((n - j) * block + t[:, None] - t[None, :])[None]
            decay = jnp.exp(log_decay[:, None, None] * jnp.maximum(distance, 0))
            weights = jnp.where(distance >= 0, decay, 0)[None]  # [1, H, T, S]
            scores = jnp.einsum(
                "bthd,bshd->bhts", queries[n], keys[j], preferred_element_type=jnp.float32
            )
            weighted = (scores * weights).astype(v.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            return o + product("bhts,bshe->bthe", weighted, values[j])

        return jax.lax.fori_loop(0, n + 1, add, jnp.zeros(values.shape[1:])).astype(v.dtype)

    o = jax.lax.map(rows, jnp.arange(length // block))
    return jnp.moveaxis(o, 0, 1).reshape(v.shape)


def left_gradients(q, k, v, do, log_decay, block: int = BLOCK) -> tuple[Array, ...]:
    """o, dq, dk and dv: each is a left product, those of k and v from the end to the start."""
    attend = functools.partial(left_product, log_decay=log_decay, block=block)

    def reverse(*arrays: Array) -> Array:
        return jnp.flip(attend(*(jnp.flip(x, 1) for x in arrays)), 1)

    return attend(q, k, v), attend(do, v, k), reverse(v, do, q), reverse(k, q, do)


type Pair = tuple[Callable[..., Any], Callable[..., Any]]


def operators() -> dict[str, Pair]:
    """Forward (q, k, v, log_decay) and forward + backward (q, k, v, do, log_decay) of each."""

    def softmax(attend: Callable[..., Any]) -> Pair:
        return (
            lambda q, k, v, log_decay: attend(q, k, v),
            lambda q, k, v, do, log_decay: with_gradients(attend)(q, k, v, do),
        )

    found = {
        "LA2": (lightning_attention, with_gradients(lightning_attention)),
        "LA1": (left_product, left_gradients),
        "softmax": softmax(flash_attention),
    }
    if jax.default_backend() == "gpu":
        found["softmax, cuDNN"] = softmax(
            functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        )
    return found


@dataclasses.dataclass(frozen=True)
class Generations:
    """Milliseconds and memory of one call, by operator and length."""

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Time forward, and forward + backward; all is compiled before the first is timed."""
        del runs  # nothing is trained
        plan = [(shape, name) for shape in SHAPES[scale] for name in operators()]
        programs = iter(compile_all(lower for where in plan for lower in _lowerings(*where)))
        for shape, name in plan:
            inputs = shape.inputs()
            row: dict[str, Any] = {"operator": name, "length": shape.length, "batch": shape.batch}
            row |= {"heads": shape.heads, "width": shape.width}
            for what, names in (("forward", FORWARD), ("forward_backward", INPUTS)):
                program, arrays = next(programs), [inputs[n] for n in (*names, "log_decay")]
                row[f"{what}_ms"] = time_ms(program, *arrays, batches=3)
                row[f"{what}_bytes"] = bytes_needed(program)
            yield row

    def table(self, rows: Sequence[Row]) -> str:
        """A row per operator and length."""
        lines = [
            f"# Generations of lightning attention on {rows[0]['device']}",
            "",
            f"{rows[0]['batch']} x {rows[0]['heads']} heads of {rows[0]['width']}; LA1 is plain "
            "JAX. Published: the authors' kernel and FlashAttention-2, on a GPU not named.",
            "",
            "| length | operator | forward, ms | published | forward + backward, ms | published | "
            "ns per token | MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            known = published(r)
            ms, total = ("", "") if known is None else (f"{known[0]:.2f}", f"{sum(known):.2f}")
            lines.append(
                f"| {r['length']} | {r['operator']} | {r['forward_ms']:.3f} | {ms} | "
                f"{r['forward_backward_ms']:.3f} | {total} | {ns_per_token(r):.1f} | "
                f"{r['forward_backward_bytes'] / 2**20:,.0f} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Time per token and memory by length."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(10, 4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for name in dict.fromkeys(r["operator"] for r in rows):
            ours = [r for r in rows if r["operator"] == name]
            lengths = [r["length"] for r in ours]
            time.plot(lengths, [ns_per_token(r) for r in ours], "o-", label=name)
            memory.plot(lengths, [r["forward_backward_bytes"] / 1e9 for r in ours], "o-")
        for colour, (name, times) in zip("rk", PUBLISHED.items(), strict=True):
            known = [sum(ms) * 1e6 / (rows[0]["batch"] * n) for n, ms in times.items()]
            if rows[0]["heads"] == SHAPES["paper"][0].heads:
                time.plot(list(times), known, f"{colour}:", label=f"{name}, published")
        for axes, label in ((time, "ns per token"), (memory, "GB")):
            length_axis(axes, sorted({r["length"] for r in rows}), "sequence length")
            tidy(axes)
            axes.set_yscale("log")
            axes.set_ylabel(f"{label}, forward + backward")
        figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def published(row: Row) -> tuple[float, float] | None:
    """What the authors print for a row: of LA2, and for cuDNN's softmax of FlashAttention-2."""
    name = {"LA2": "LA2", "softmax, cuDNN": "FlashAttention-2"}.get(row["operator"])
    return PUBLISHED[name].get(row["length"]) if name else None


def ns_per_token(row: Row) -> float:
    """Of forward + backward."""
    return row["forward_backward_ms"] * 1e6 / (row["batch"] * row["length"])


def _lowerings(shape: Shape, name: str) -> Iterator[Callable[[], jax.stages.Lowered]]:
    types = jax.eval_shape(shape.inputs)
    for function, names in zip(operators()[name], (FORWARD, INPUTS), strict=True):
        args = [types[n] for n in (*names, "log_decay")]
        yield functools.partial(jax.jit(function).lower, *args)


EXPERIMENT = Generations()
