"""Decoding by length of the context: constant time and memory for TNL, growing for softmax.

Claim (2405.17381, section on inference and figure 5, one A100-80G, 7B): memory and time per token
of TNL do not depend on the context; 2820 tokens/s against 538 of LLaMA-2 with prompts of 512, each
with the batch that suits it best.
Command: longctx reproduce experiments/transnormer/decoding.py --scale paper
Expected: TNL flat in tokens/s and in bytes; the Transformer's cache grows with the context, and
its speed falls. Steps of one token are timed after so many others; what these were does not
matter, so that the prompt is not read.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.bench._timing import time_ms
from experiments.transnormer.base import PAPER, SMOKE
from longctx.models import MODELS, ModelConfig, build, count_parameters, transformer
from longctx.nn.cache import Cache
from longctx.reproduce import Row

# Tokens per second of the paper's 7B models, prompts of 512 (figure 5).
PAPER_SPEED = {"TNL": 2819.6, "Transformer": 538.0}
STEPS = 32  # tokens decoded in one call; the cache is copied once for them


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
        """Time one step of each model at each context."""
        del runs  # nothing is trained
        grid = GRIDS[scale]
        models = {"TNL": grid.model, "Transformer": transformer(grid.model)}
        for name, model in models.items():
            yield from _time_model(name, model, grid)

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
                row = cells[name, context]
                shown += [f"{row['tokens_per_second']:,.0f}", f"{row['row_bytes'] / 1e6:,.2f}"]
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
                axes.plot(*zip(*ours, strict=True), "o-", label=name)
            axes.set(xlabel="tokens of context", ylabel=label, yscale="log")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"Decoding on {rows[0]['device']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _time_model(name: str, config: ModelConfig, grid: Grid) -> Iterator[Row]:
    """Time steps of one model; its weights, in the computation's dtype, are made once."""
    config = dataclasses.replace(config, param_dtype=config.dtype)
    graph, state = jax.jit(lambda: nnx.split(build(config, rngs=nnx.Rngs(0))))()

    @jax.jit
    def decode(state: Any, token: Any, cache: Cache) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            logits, cache = nnx.merge(graph, state).decode(*carry)
            return (jnp.argmax(logits, -1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (token, cache), length=STEPS)[0][0]

    for context in grid.contexts:
        cache = nnx.merge(graph, state).init_cache(grid.batch, context + STEPS)
        cache = Cache(jnp.full(grid.batch, context), cache.memory)
        token = jnp.zeros(grid.batch, jnp.int32)
        ms = time_ms(decode, state, token, cache, batches=3) / STEPS
        size = sum(x.nbytes for x in jax.tree.leaves(cache.memory))
        yield {
            "model": name,
            "parameters": count_parameters(config),
            "context": context,
            "batch": grid.batch,
            "ms": ms,
            "tokens_per_second": grid.batch / ms * 1e3,
            "row_bytes": size / grid.batch,
        }


EXPERIMENT = Decoding()
