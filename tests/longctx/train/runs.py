"""Tiny runs on generated text, for the tests of everything around a run."""

import dataclasses
import pathlib
import random
from typing import Any

from longctx.data.config import DataConfig
from longctx.models import LightningConfig, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

TNL = ModelConfig(
    vocab_size=257,
    width=16,
    num_layers=1,
    lightning=LightningConfig(num_heads=2, head_dim=8),
    softmax=SoftmaxConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    mlp=MlpConfig(width=32),
    dtype="float32",
)
TRANSFORMER = dataclasses.replace(TNL, mixers=("softmax",), norm="rms")


def write_text(directory: pathlib.Path) -> str:
    """Ten thousand words drawn from a hundred, always the same ones."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(100)]
    path = directory / "words.txt"
    path.write_text(" ".join(draw.choices(words, k=10_000)))
    return str(path)


def write_run_file(directory: pathlib.Path, source: str) -> str:
    """A file whose entry `RUN` is the tiny run on `source`, as the command line names it."""
    path = directory / "run.py"
    text = f"from tests.longctx.train.runs import tiny_run\n\nRUN = tiny_run({source!r})\n"
    path.write_text(text)
    return f"{path}:RUN"


def tiny_run(source: str, model: ModelConfig = TNL, **train: Any) -> RunConfig:
    """Twenty steps of sixteen sequences of 24 tokens."""
    return RunConfig(
        model=model,
        data=DataConfig(source=source, sequence_length=24, batch_size=16),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(**{"steps": 20, "log_every": 1, "checkpoint_every": 5} | train),
        eval=EvalConfig(tokens=240),
    )
