"""Language models with tensorized attention, and how they extrapolate beyond the trained length.

Claim (2410.20926, abstract): models trained at 32768 tokens keep a steady perplexity to 131072.
Its tables could not be read, so no number of the paper stands beside ours.
Command: longctx reproduce experiments/tensorized/language_model.py --scale small
Expected: dominance worst of the causal arms, by what block starts lose; mixed radix with the
self-edge bias near dense; beyond the trained length dense RoPE degrades and digit positions do
not. Whether the slow hop beats the window alone is the open question, and needs text with
dependencies beyond the window.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.data.config import DataConfig
from longctx.eval.lengths import evaluate
from longctx.models import BYTE_VOCAB, MODELS, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.models.config import TensorizedConfig
from longctx.reproduce import Ablation, Arm, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

BEYOND = (1, 2, 4, 8)  # multiples of the trained length


def llama(
    width: int, layers: int, heads: int, fast: int, *, dtype: str = "bfloat16", hidden: int = 0
) -> ModelConfig:
    """A small model of Llama's shape on bytes; `fast` is n_1, and the window of the window arm."""
    return ModelConfig(
        vocab_size=BYTE_VOCAB,
        width=width,
        num_layers=layers,
        mixers=("softmax",),
        softmax=SoftmaxConfig(
            num_heads=heads, num_kv_heads=max(1, heads // 2), head_dim=width // heads, window=fast
        ),
        tensorized=TensorizedConfig(dims=(fast, None)),
        mlp=MlpConfig(width=hidden or 8 * width // 3 // 64 * 64, activation="silu"),
        norm="rms",
        scale_embedding=False,
        dtype=dtype,
    )


# The shape the paper names, Llama-8B (numbers of Llama 3), at its trained length.
PAPER = RunConfig(
    model=dataclasses.replace(
        MODELS["llama-3-8b"],
        softmax=dataclasses.replace(MODELS["llama-3-8b"].softmax, window=512),
        tensorized=TensorizedConfig(dims=(512, None)),
        remat="block",
    ),
    data=DataConfig(sequence_length=32768, batch_size=32),
    optim=OptimConfig(learning_rate=2e-5),
    train=TrainConfig(steps=1000, checkpoint_every=100),
    eval=EvalConfig(every=100, tokens=1 << 20),
)
SMALL = RunConfig(
    model=llama(384, 6, 6, 128),
    data=DataConfig(sequence_length=4096, batch_size=16),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=40),
    train=TrainConfig(steps=2000, log_every=50, checkpoint_every=10_000),
    eval=EvalConfig(tokens=1 << 20),
)
TINY = RunConfig(
    model=llama(32, 2, 2, 8, dtype="float32", hidden=64),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=512),
)


def mixer(run: RunConfig, name: str) -> RunConfig:
    """`run` with another mixer."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, mixers=(name,)))


def folded(run: RunConfig, parts: int = 2, **changes: Any) -> RunConfig:
    """`run` with tensorized attention; three parts split n_1 in two."""
    fast = run.model.softmax.window
    dims = (fast, None) if parts == 2 else (fast // 4, 4, None)
    if changes.get("variant") in ("dominance", "hierarchical"):
        changes["self_bias"] = None
    tensorized = TensorizedConfig(dims=dims, **changes)
    return mixer(
        dataclasses.replace(run, model=dataclasses.replace(run.model, tensorized=tensorized)),
        "tensorized",
    )


def _folded(**changes: Any) -> Arm:
    return Arm(change=functools.partial(folded, **changes))


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """The arms of an ablation, each scored at and beyond its trained length."""

    ablation: Ablation

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each arm."""
        return self.ablation.runs(scale)

    def measure(self, scale: str, runs: Path) -> list[Row]:
        """Train every arm, then score it at each length, by tokens of context."""
        rows = []
        for row in self.ablation.measure(scale, runs):
            config = self.ablation.scales[scale]
            trained = config.data.sequence_length
            scores = evaluate(
                runs / row["run"], [m * trained for m in BEYOND], tokens=config.eval.tokens
            )
            rows += [{**row, "trained": trained, **dataclasses.asdict(score)} for score in scores]
        return rows

    def table(self, rows: Sequence[Row]) -> str:
        """Bits per byte: a row per run, a column per length."""
        lengths = sorted({r["length"] for r in rows})
        lines = [
            f"# {self.ablation.title} ({self.ablation.source})",
            "",
            f"Held-out bits per byte; trained at {rows[0]['trained']} tokens "
            f"({rows[0]['scale']} scale, {rows[0]['device']}).",
            "",
            f"| arm | seed | {' | '.join(map(str, lengths))} |",
            f"|---|---|{'---|' * len(lengths)}",
        ]
        for arm, seed in dict.fromkeys((r["arm"], r["seed"]) for r in rows):
            found = {
                r["length"]: r["bits_per_byte"]
                for r in rows
                if (r["arm"], r["seed"]) == (arm, seed)
            }
            lines.append(f"| {arm} | {seed} | {' | '.join(f'{found[n]:.4f}' for n in lengths)} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Loss by tokens of context at the largest length."""
        from matplotlib.figure import Figure  # slow to import

        longest = max(r["length"] for r in rows)
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens of context", ylabel="held-out bits per byte")
        for r in rows:
            if r["length"] != longest:
                continue
            shown = [b for b in r["buckets"] if b["tokens"]]
            centres = [(b["first"] + b["last"]) / 2 for b in shown]
            axes.plot(centres, [b["bits_per_byte"] for b in shown], "o-", label=r["arm"])
        axes.axvline(rows[0]["trained"], color="grey", linestyle=":", label="trained length")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


EXPERIMENT = Extrapolation(
    Ablation(
        "Tensorized attention and extrapolation",
        "arXiv 2410.20926",
        paper_unit="(tables could not be read)",
        base="dense",
        arms={
            "dense": Arm(),
            "window": Arm(change=functools.partial(mixer, name="window")),
            "mixed radix": _folded(),
            "mixed radix, fast first": _folded(order="fast_first"),
            "mixed radix, global positions": _folded(positions="global"),
            "mixed radix, no self-edge bias": _folded(self_bias=None),
            "mixed radix, 3 dimensions": _folded(parts=3),
            "hierarchical": _folded(variant="hierarchical"),
            "dominance": _folded(variant="dominance"),
        },
        scales={"paper": PAPER, "small": SMALL, "smoke": TINY},
        seeds={"smoke": 1, "small": 2, "paper": 1},
    )
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
