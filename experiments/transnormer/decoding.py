"""Decoding by length of the context: constant time and memory for TNL, growing for softmax.

Claim (2405.17381, section on inference and figure 5, one A100-80G, 7B): memory and time per token
of TNL do not depend on the context; 2820 tokens/s against 538 of LLaMA-2 with prompts of 512, each
with the batch that suits it best.
Command: longctx reproduce experiments/transnormer/decoding.py --scale paper
Expected: TNL flat in tokens/s and in bytes; the Transformer's cache grows with the context, and
its speed falls. Steps of one token are timed after so many others; what these were does not
matter, so that the prompt is not read. A context whose cache the device cannot hold is named.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.bench._timing import time_ms
from experiments.transnormer.base import PAPER, SMOKE
from longctx.compiler import decoding_options
from longctx.device.programs import compile_all, does_not_fit
from longctx.models import MODELS, ModelConfig, build, count_parameters, transformer
from longctx.nn.cache import Cache
from longctx.reproduce import Row

# Tokens per second of the paper's 7B models, prompts of 512 (figure 5).
PAPER_SPEED = {"TNL": 2819.6, "Transformer": 538.0}
STEPS = 32  # tokens decoded in one call, which writes them behind the context again


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is timed at one scale."""

    model: ModelConfig
    batch: int
    contexts: tuple[int, ...]


GRIDS = {
    "smoke": Grid(SMOKE.model, 2, (32, 64)),
    "small": Grid(PAPER.model, 4, (1024, 8192, 32768)),
    "paper": Grid(MODELS["tnl-7b"], 8, (512, 2048, 8192, 16384)),
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Tokens per second and bytes of the cache, by model and context."""

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Time one step of each model at each context; all are compiled before."""
        del runs  # nothing is trained
        grid = GRIDS[scale]
        models = {
            name: dataclasses.replace(model, param_dtype=model.dtype)
            for name, model in (("TNL", grid.model), ("Transformer", transformer(grid.model)))
        }
        programs = iter(
            compile_all(
                functools.partial(_lower, model, grid.batch, context)
                for model in models.values()
                for context in grid.contexts
            )
        )
        for name, model in models.items():
            state = jax.jit(lambda model=model: nnx.state(build(model, rngs=nnx.Rngs(0))))()
            for context in grid.contexts:
                row = {"model": name, "parameters": count_parameters(model), "context": context}
                yield {**row, **_speed(next(programs), state, model, grid.batch, context)}

    def table(self, rows: Sequence[Row]) -> str:
        """A row per context, columns per model."""
        cells = {(r["model"], r["context"]): r for r in rows}
        lines = [
            f"# Decoding on {rows[0]['device']}, {rows[0]['parameters'] / 1e6:.0f}M parameters",
            "",
            f"Tokens per second of {rows[0]['batch']} rows together, and MB of the cache per row. "
            "The paper's (7B, prompts of 512, one A100, batch tuned): "
            + ", ".join(f"{name} {speed:,.0f}" for name, speed in PAPER_SPEED.items())
            + ".",
            "",
            "| context | TNL | cache | Transformer | cache |",
            "|---|---|---|---|---|",
        ]
        for context in sorted({r["context"] for r in rows}):
            shown = []
            for name in PAPER_SPEED:
                row = cells.get((name, context), {"absent": "not measured"})
                speed, size = row.get("tokens_per_second"), row.get("row_bytes")
                shown += [row["absent"] if speed is None else f"{speed:,.0f}"]
                shown += ["" if size is None else f"{size / 1e6:,.2f}"]
            lines.append(f"| {context} | {' | '.join(shown)} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Speed and memory over the context."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2)
        shown = (("tokens_per_second", "tokens per second"), ("row_bytes", "cache per row, bytes"))
        for axes, (column, label) in zip(panels, shown, strict=True):
            for name in PAPER_SPEED:
                ours = [(r["context"], r[column]) for r in rows if r["model"] == name]
                ours = [point for point in ours if point[1] is not None]
                axes.plot(*zip(*ours, strict=True), "o-", label=name)
            axes.set(xlabel="tokens of context", ylabel=label, yscale="log")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"Decoding on {rows[0]['device']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _cache(config: ModelConfig, batch: int, context: int) -> Cache:
    """The cache of so many tokens, with room for the steps."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    cache = nnx.merge(graph, state).init_cache(batch, context + STEPS)
    return Cache(jnp.full(batch, context), cache.memory)


def _lower(config: ModelConfig, batch: int, context: int) -> jax.stages.Lowered:
    """(state, token, cache) -> (last token, the cache before the steps); the cache is donated."""
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: _cache(config, batch, context))

    def decode(state: Any, token: Any, cache: Cache) -> tuple[Any, Cache]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            logits, cache = nnx.merge(graph, state).decode(*carry)
            return (jnp.argmax(logits, -1).astype(jnp.int32), cache), None

        (token, after), _ = jax.lax.scan(step, (token, cache), length=STEPS)
        return token, Cache(cache.length, after.memory)

    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    options = decoding_options(jax.default_backend())
    return jax.jit(decode, donate_argnums=2, compiler_options=options).lower(state, token, cache)


def _speed(
    decode: jax.stages.Compiled, state: Any, config: ModelConfig, batch: int, context: int
) -> dict[str, Any]:
    """Milliseconds of a step, or why there are none, and bytes of the cache."""
    shapes = jax.eval_shape(lambda: _cache(config, batch, context))
    row: dict[str, Any] = {
        "batch": batch,
        "ms": None,
        "tokens_per_second": None,
        "row_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.memory)) / batch,
        "absent": does_not_fit(decode),
    }
    if row["absent"] is not None:
        return row
    token, cache = jnp.zeros(batch, jnp.int32), jax.jit(lambda: _cache(config, batch, context))()

    def call() -> Any:
        nonlocal cache
        last, cache = decode(state, token, cache)
        return last

    try:
        ms = time_ms(call, batches=3) / STEPS
    except jax.errors.JaxRuntimeError as failure:  # its buffers fit, but not as memory lies now
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        return row | {"absent": str(failure).split(" with allocator")[0]}
    return row | {"ms": ms, "tokens_per_second": batch / ms * 1e3}


EXPERIMENT = Decoding()
