"""What the ablation tables of TransNormerLLM share: the base run at three scales.

paper: TNL-385M, 100K updates as printed; optimizer settings of the first author's own small TNL,
since the papers print none; 256 sequences of 1024 (ours: the paper's batch is not printed).
small: the same architecture at 28M parameters on bytes, 17M tokens of the standard library (ours),
so that one GPU is enough for all tables; small differences stay unresolved with so few.
smoke: two steps of a tiny model, to show that every arm runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from longctx.data.config import DataConfig
from longctx.models import BYTE_VOCAB, MODELS, tnl
from longctx.reproduce import Ablation, Arm
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

PAPER = RunConfig(
    model=MODELS["tnl-385m"],
    data=DataConfig(sequence_length=1024, batch_size=256),
    optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, log_every=100, checkpoint_every=1000),
    eval=EvalConfig(every=1000, tokens=1 << 20),
)
SMALL = RunConfig(
    model=dataclasses.replace(tnl(512, 8, 1408, head_dim=64), vocab_size=BYTE_VOCAB),
    data=DataConfig(sequence_length=1024, batch_size=32),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=50),
    train=TrainConfig(steps=512, log_every=100, checkpoint_every=10_000),
    eval=EvalConfig(tokens=1 << 20),
)
SMOKE = RunConfig(
    model=dataclasses.replace(tnl(32, 2, 64, head_dim=16), vocab_size=BYTE_VOCAB, dtype="float32"),
    data=DataConfig(sequence_length=64, batch_size=2),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
    train=TrainConfig(steps=2, log_every=1),
    eval=EvalConfig(tokens=128),
)


def model(run: RunConfig, **changes: Any) -> RunConfig:
    """`run` with other fields of its model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def lightning(run: RunConfig, **changes: Any) -> RunConfig:
    """`run` with other fields of its linear attention."""
    return model(run, lightning=dataclasses.replace(run.model.lightning, **changes))


def ablation(title: str, table: str, base: str, arms: Mapping[str, Arm]) -> Ablation:
    """A table of 2405.17381 (the same numbers as in 2307.14995): losses in bits per token."""
    return Ablation(
        title=title,
        source=f"arXiv 2405.17381, {table}",
        paper_unit="bits per token of a 385M model",
        base=base,
        arms=arms,
        scales={"paper": PAPER, "small": SMALL, "smoke": SMOKE},
    )
