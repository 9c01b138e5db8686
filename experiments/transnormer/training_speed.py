"""Training speed by sequence length: constant for TNL, falling for the softmax Transformer.

Claim (2401.04658, table 1, 0.4B, 2 x A100-80G): TNL keeps some 38K tokens/s per GPU from 1K to 92K
tokens; LLaMA with FlashAttention-2 falls from 36K to 4K.
Command: longctx reproduce experiments/transnormer/training_speed.py --scale paper
Expected: TNL flat within 5% from 1K to 128K tokens; the Transformer slower at every length
beyond a few thousand tokens. Whole training steps of 131072 random tokens, whatever the length.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.transnormer.base import PAPER, SMOKE
from longctx.data.config import DataConfig
from longctx.device.programs import compile_all
from longctx.figures import length_axis, tidy
from longctx.models import count_parameters, transformer
from longctx.parallel.mesh import make_mesh
from longctx.plan import lower_step
from longctx.reproduce import Row
from longctx.train.config import RunConfig
from longctx.train.flops import device_peak, step_flops
from longctx.train.step import create_state, put_batch

# Tokens per GPU and second of the 0.4B models in the paper, by sequence length.
PAPER_SPEED = {
    "TNL": {
        1024: 38615, 2048: 38680, 4096: 38714, 8192: 38172, 16384: 37755,
        32768: 37364, 65536: 38278, 81920: 38457, 94208: 38596,
    },
    "Transformer": {
        1024: 35931, 2048: 32453, 4096: 28184, 8192: 21996, 16384: 15479,
        32768: 9715, 65536: 5643, 81920: 4604, 94208: 4078,
    },
}  # fmt: skip
LENGTHS = (1024, 4096, 16384, 65536, 131072)
TOKENS = 131072
STEPS = 4


@dataclasses.dataclass(frozen=True)
class TrainingSpeed:
    """Tokens per second of whole training steps, by model and length."""

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Time warm steps; every program is compiled before the first is timed."""
        del runs  # nothing is trained to an end
        base, lengths, tokens = PAPER, LENGTHS, TOKENS
        if scale == "smoke":
            base, lengths, tokens = SMOKE, (64, 128), 256
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, remat="block"))
        models = {"TNL": base.model, "Transformer": transformer(base.model)}
        data = [DataConfig(sequence_length=n, batch_size=tokens // n) for n in lengths]
        configs = {
            name: [dataclasses.replace(base, model=model, data=shape) for shape in data]
            for name, model in models.items()
        }
        mesh = make_mesh()
        every = itertools.chain(*configs.values())
        steps = iter(compile_all(functools.partial(lower_step, config, mesh) for config in every))
        for name, several in configs.items():
            yield from time_steps(name, several, list(itertools.islice(steps, len(several))), mesh)

    def table(self, rows: Sequence[Row]) -> str:
        """A row per length, a column per model."""
        cells = {(r["model"], r["length"]): r for r in rows}
        tnl = [r["tokens_per_second"] for r in rows if r["model"] == "TNL" and "failed" not in r]
        size = f"{rows[0]['parameters'] / 1e6:.0f}M parameters"
        lines = [
            f"# Training speed on {rows[0]['device']}, {size}",
            "",
            "Tokens per second of whole training steps; the paper's on one of two A100.",
            f"TNL: {min(tnl) / max(tnl):.3f} of its fastest length at its slowest (claim: 0.95)."
            if tnl
            else "TNL ran at no length.",
            "",
            "| length | TNL | MFU | Transformer | MFU | ratio | paper: TNL | Transformer |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for length in sorted({r["length"] for r in rows}):
            ours = [cells[name, length] for name in PAPER_SPEED]
            shown = [
                "failed | "
                if "failed" in r
                else f"{r['tokens_per_second']:,.0f} | {_percent(r['mfu'])}"
                for r in ours
            ]
            paper = [str(PAPER_SPEED[name].get(length, "")) for name in PAPER_SPEED]
            speeds = [r["tokens_per_second"] for r in ours if "failed" not in r]
            ratio = f"{speeds[0] / speeds[1]:.2f}" if len(speeds) == 2 else ""
            lines.append(f"| {length} | {' | '.join([*shown, ratio, *paper])} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Tokens per second over length."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(ylabel="tokens per second", yscale="log")
        for colour, (name, paper) in zip(("C0", "C1"), PAPER_SPEED.items(), strict=True):
            mine = [r for r in rows if r["model"] == name and "failed" not in r]
            ours = [(r["length"], r["tokens_per_second"]) for r in mine]
            if ours:
                label = f"{name}, {rows[0]['device']}"
                axes.plot(*zip(*ours, strict=True), "o-", color=colour, label=label)
            axes.plot(list(paper), list(paper.values()), ":", color=colour, label=f"{name}, paper")
        length_axis(axes, sorted({r["length"] for r in rows}), "sequence length")
        tidy(axes)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


class Running:
    """A model that trains on random tokens; its steps at all lengths share one state."""

    def __init__(self, config: RunConfig, mesh: jax.sharding.Mesh):
        self.mesh, self.rng = mesh, np.random.default_rng(0)
        with jax.set_mesh(mesh):
            self.state = create_state(config, mesh)

    def steps(self, config: RunConfig, step: jax.stages.Compiled) -> Callable[..., float]:
        """A function that runs so many warm steps, queued, and returns the seconds of one.

        Raises:
          JaxRuntimeError: the step does not fit; the state is lost.
        """
        batch = random_batch(config, self.rng, self.mesh)

        def run(count: int = 1) -> float:
            began, metrics = time.perf_counter(), None
            for _ in range(count):
                self.state, metrics = step(self.state, batch)
            jax.block_until_ready((self.state, metrics))
            return (time.perf_counter() - began) / count

        run()
        return run


def time_steps(
    name: str,
    configs: Sequence[RunConfig],
    compiled: Sequence[jax.stages.Compiled],
    mesh: jax.sharding.Mesh,
    repeats: int = STEPS,
) -> Iterator[Row]:
    """Time one model's compiled steps at all lengths."""
    running = Running(configs[0], mesh)
    for config, step in zip(configs, compiled, strict=True):
        try:
            run = running.steps(config, step)
            seconds = [run() for _ in range(repeats)]
        except jax.errors.JaxRuntimeError as failure:  # out of memory: keep what was measured
            yield about(name, config) | {"failed": str(failure)[:200]}
            running = Running(configs[0], mesh)
            continue
        yield about(name, config) | speed(config, step, mesh.size, statistics.median(seconds))


def about(name: str, config: RunConfig) -> dict[str, Any]:
    """What a row says of a run whose steps are timed."""
    length = config.data.sequence_length
    return {
        "model": name,
        "parameters": count_parameters(config.model),
        "length": length,
        "tokens": config.tokens_per_step,
        "paper": PAPER_SPEED[name].get(length),
    }


def speed(
    config: RunConfig, step: jax.stages.Compiled, devices: int, seconds: float
) -> dict[str, Any]:
    """What a row says of a step that takes so long on so many devices."""
    peak = device_peak(jax.devices()[0])
    flops = step_flops(config.model, config.data.sequence_length, config.tokens_per_step)
    memory = step.memory_analysis()
    return {
        "seconds": seconds,
        "tokens_per_second": config.tokens_per_step / seconds,
        "mfu": flops / seconds / (peak * devices) if peak else None,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }


def random_batch(config: RunConfig, rng: np.random.Generator, mesh: jax.sharding.Mesh) -> Any:
    """One batch of a run, of random tokens."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "doc_start": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    return put_batch(batch, mesh, config.parallel.layout)


EXPERIMENT = TrainingSpeed()
