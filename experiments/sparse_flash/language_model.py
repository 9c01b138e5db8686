"""Language models with hash-sparse and dropping attention against dense attention.

Claim (2306.01160, text and figures; no table): hash-sparse with 16 buckets at 8192 tokens reaches
the dense model's perplexity in half the time; dropping 30% matches it too, 50% and 70% are worse
in that order. All models tie keys to normalised queries; the released dense baseline normalises
all heads together, the sparse models each head alone, so both baselines are run here, and an
untied one.
Command: longctx reproduce experiments/sparse_flash/language_model.py --scale small
Expected at equal steps: hash within noise of "dense tied"; drop 0.3 close to it, 0.5 and 0.7
worse in that order. The small scale has 2048 tokens, where 4 buckets hold 512 tokens each as the
paper's 16 at 8192 do, 11M parameters, 13M tokens of Python, a byte each, and two seeds of every
arm. The paper scale reads OpenWebText2 and GPT-2's tokenizer from data/openwebtext2.jsonl.zst.tar
and data/gpt2.json, and is trained arm by arm too:
`longctx train experiments/sparse_flash/language_model.py:"hash nb=16"`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.config import DataConfig
from longctx.models import BYTE_VOCAB, MODELS, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.models.config import SparseConfig
from longctx.reproduce import Ablation, Arm, Part, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig


def gpt(width: int, layers: int, length: int, **changes: Any) -> ModelConfig:
    """GPT-2's shape with heads of 64, learned positions and tied attention (authors' code)."""
    heads = max(1, width // 64)
    return dataclasses.replace(
        MODELS["gpt2-small"],
        width=width,
        num_layers=layers,
        mixers=("tied",),
        softmax=SoftmaxConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=width // heads, rope=False
        ),
        mlp=MlpConfig(kind="mlp", width=4 * width, activation="gelu"),
        learned_positions=length,
        **changes,
    )


# Authors' code: 15000 steps of 64 x 8192 tokens, OneCycle cosine from 1e-3 to 2e-4, 2% warm-up, no
# clipping (here the norm is bounded by 1).
OPTIM = OptimConfig(learning_rate=1e-3, final_fraction=0.2, warmup_steps=300)
PAPER = RunConfig(
    model=gpt(768, 12, 8192),
    data=DataConfig(
        source="openwebtext2:data/openwebtext2.jsonl.zst.tar",
        tokenizer="data/gpt2.json",
        sequence_length=8192,
        batch_size=64,
    ),
    optim=OPTIM,
    train=TrainConfig(steps=15_000, accumulation=8, log_every=100, checkpoint_every=1000),
    eval=EvalConfig(every=1000, tokens=1 << 20),
)
SMALL = RunConfig(
    model=gpt(384, 6, 2048, vocab_size=BYTE_VOCAB),
    data=DataConfig(sequence_length=2048, batch_size=16),
    optim=dataclasses.replace(OPTIM, warmup_steps=40),
    train=TrainConfig(steps=400, log_every=50, checkpoint_every=10_000),
    eval=EvalConfig(every=80, tokens=1 << 19),
)
TINY = RunConfig(
    model=gpt(32, 2, 64, vocab_size=BYTE_VOCAB, dtype="float32"),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=128),
)


def attention(run: RunConfig, mixer: str, **changes: Any) -> RunConfig:
    """`run` with another mixer, or other numbers of the sparse ones."""
    sparse = dataclasses.replace(SparseConfig(), **changes)
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, mixers=(mixer,), sparse=sparse)
    )


def _arm(mixer: str, **changes: Any) -> Arm:
    return Arm(change=functools.partial(attention, mixer=mixer, **changes))


@dataclasses.dataclass(frozen=True)
class Comparison(Ablation):
    """An ablation whose arms differ in speed too: loss by step and by time of the steps."""

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """A part per arm and seed, whose steps are timed."""
        return [dataclasses.replace(part, timed=True) for part in super().parts(scale, runs)]

    def table(self, rows: Sequence[Row]) -> str:
        """Differences from the base, then what they cost in time, as far as it is known."""
        timed = [r for r in rows if r["tokens_per_second"]]
        if not timed:
            return super().table(rows)
        target = np.mean([r["bits_per_byte"] for r in rows if r["arm"] == self.base])
        lines = [
            super().table(rows),
            "Seconds of training steps, and until the base arm's final loss was reached:",
            "",
            "| arm | seed | all steps | to the base's loss |",
            "|---|---|---|---|",
        ]
        for r in timed:
            _, seconds, losses = curve(r)
            reached = next(
                (f"{t:.1f}" for t, loss in zip(seconds, losses, strict=True) if loss <= target),
                "never",
            )
            lines.append(f"| {r['arm']} | {r['seed']} | {seconds[-1]:.1f} | {reached} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Held-out loss by step, and by wall time if known: a line per run, a colour per arm."""
        from matplotlib.figure import Figure  # slow to import

        timed = any(r["tokens_per_second"] for r in rows)
        labels = ["step", "seconds of training steps"][: 1 + timed]
        figure = Figure(figsize=(3 + 5 * len(labels), 5), layout="constrained")
        panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for i, arm in enumerate(dict.fromkeys(r["arm"] for r in rows)):
            for seed, r in enumerate(r for r in rows if r["arm"] == arm):
                steps, seconds, loss = curve(r)
                style = {"color": f"C{i}", "label": None if seed else arm}
                for axes, x in zip(panels, (steps, seconds), strict=False):
                    axes.plot(x, loss, ".-", **style)
        for axes, label in zip(panels, labels, strict=True):
            axes.set(xlabel=label, yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
        panels[0].set_ylabel("held-out bits per byte")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def curve(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds that they take when nothing else uses the device, and held-out loss."""
    steps, losses = np.asarray(row["curve"]).T
    per_step = row["tokens"] / steps[-1] / (row["tokens_per_second"] or np.nan)
    return steps, steps * per_step, losses


EXPERIMENT = Comparison(
    "Hash-sparse and dropping attention",
    "arXiv 2306.01160, section 4",
    paper_unit="(no numbers are printed)",
    base="dense tied",
    arms={
        "dense tied": Arm(),
        "dense tied, all heads normalised together": _arm("tied", key_norm="all"),
        "dense untied": _arm("softmax"),
        **{f"hash nb={n}": _arm("hash", num_buckets=n) for n in (4, 8, 16, 32)},
        **{f"drop {share}": _arm("drop", drop=share) for share in (0.3, 0.5, 0.7)},
    },
    scales={"paper": PAPER, "small": SMALL, "smoke": TINY},
    seeds={"smoke": 1, "small": 2, "paper": 1},
    arm_seeds={"small": 2},
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
