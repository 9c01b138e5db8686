"""What a run is: one frozen dataclass per concern, all of it in the run's `config.json`."""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from longctx.data.config import DataConfig
from longctx.errors import UserError, told_as
from longctx.models import ModelConfig
from longctx.models.config import ParallelConfig
from longctx.parallel.layout import as_layout
from longctx.parallel.mesh import MeshConfig
from longctx.train.serialize import from_json, to_json

CONFIG_FILE = "config.json"


class RunError(UserError):
    """A run cannot start or go on; the message says where it stands."""


type Decay = Literal["cosine", "inverse_sqrt"]
type Tracker = Literal["tensorboard", "wandb"]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, then decay, and clipping by the global norm.

    TransNormerLLM's papers print none of these numbers. They are those of the first author's code
    for a small TransNormerLLM ("author code") where it has them, and ours elsewhere.
    """

    # Peak learning rate (author code).
    learning_rate: float = 6e-4
    # How it falls after the warm-up (author code): "cosine", or "inverse_sqrt" of the step.
    decay: Decay = "cosine"
    # With "cosine": learning rate of the last step, as a fraction of the peak (author code).
    final_fraction: float = 0.1
    # Steps of linear warm-up from zero (ours: author code has 2000 of 600,000).
    warmup_steps: int = 100
    # Decay of the mean of the gradients (author code).
    beta1: float = 0.9
    # Decay of the mean of their squares (author code).
    beta2: float = 0.95
    # Added to the root of the squares' mean (AdamW's default).
    epsilon: float = 1e-8
    # Decoupled weight decay (author code), of matrices only (ours).
    weight_decay: float = 0.1
    # Largest global norm of the gradient (author code).
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "weight_decay", "final_fraction"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.decay not in ("cosine", "inverse_sqrt"):
            raise ValueError(f"optim.decay={self.decay!r} must be 'cosine' or 'inverse_sqrt'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, what is kept."""

    # Optimizer steps.
    steps: int = 1000
    # Directory whose parameters the run begins with: a run, or a Hugging Face folder. Layers may be
    # of another kind there; what both have is taken. Empty: random parameters.
    init: str = ""
    # Seed of the initial parameters and of whatever the model draws.
    seed: int = 0
    # Slices into which a batch is cut; their gradients are added before the update.
    accumulation: int = 1
    # Steps between two records of metrics.
    log_every: int = 10
    # Steps between two checkpoints; the last step is always saved.
    checkpoint_every: int = 1000
    # Newest checkpoints that stay on disk.
    checkpoints_kept: int = 2
    # FIRST:LAST, the steps of which a jax profiler trace is written; empty for none.
    profile: str = ""
    # Where metrics go besides metrics.jsonl; each needs the extra of its name.
    trackers: tuple[Tracker, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "checkpoint_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        first, last = self.profile_steps
        if self.profile and not 1 <= first <= last <= self.steps:
            raise ValueError(
                f"train.profile={self.profile} must satisfy 1 <= FIRST <= LAST <= {self.steps}"
            )

    @property
    def profile_steps(self) -> tuple[int, int]:
        """First and last step of the profiler trace; (0, 0) without one."""
        if not self.profile:
            return 0, 0
        first, colon, last = self.profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise ValueError(f"train.profile={self.profile!r} must be FIRST:LAST, two step numbers")
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The held-out score during training."""

    # Steps between two held-out scores; 0 for one at the end only.
    every: int = 0
    # Held-out tokens behind each score, at the training length.
    tokens: int = 65536

    def __post_init__(self) -> None:
        if self.every < 0 or self.tokens < 1:
            raise ValueError("eval.every must not be negative, eval.tokens must be positive")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. An ablation is `dataclasses.replace(base, ...)`."""

    model: ModelConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        shards = self.mesh.data * self.mesh.fsdp * self.train.accumulation
        if self.data.batch_size % shards:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must divide by mesh.data x mesh.fsdp x "
                f"train.accumulation = {shards}"
            )
        if self.data.sequence_length % self.mesh.seq:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} must divide by "
                f"mesh.seq={self.mesh.seq}"
            )
        layout = as_layout(self.parallel.token_layout, self.mesh.seq)
        layout.check(self.data.sequence_length, self.mesh.seq)
        self.model.check_length(self.data.sequence_length, "data.sequence_length")
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must not exceed "
                f"train.steps={self.train.steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens behind one optimizer step."""
        return self.data.batch_size * self.data.sequence_length


def check_directory(config: RunConfig, out: pathlib.Path) -> None:
    """Make sure that `out` can be the directory of this run; nothing is written.

    The schedule of a run may be changed when it is resumed, what it is made of may not. Without
    checkpoints there is nothing to resume: a start that failed may be repeated with other values.

    Raises:
      RunError: `out` is a file or no run of this version, holds a run with another model, data,
        optimizer, beginning or seed, or is past the last step.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: choose another --out")
    if not (out / CONFIG_FILE).exists():
        return
    started, saved = read_config(out), newest_step(out)
    if saved is None:
        return
    for name in ("model", "data", "optim", "train.init", "train.seed"):
        value = operator.attrgetter(name)
        changed = list(_changes(value(started), value(config), name))
        if changed:
            raise RunError(
                f"{out} was started with other values ({', '.join(changed)}): "
                "take them back or choose another --out"
            )
    if config.train.steps < saved:
        raise RunError(
            f"train.steps={config.train.steps} must be at least {saved}, the step of the newest "
            f"checkpoint in {out}"
        )


def newest_step(out: pathlib.Path) -> int | None:
    """The step of the newest checkpoint in `out`, readable or not; None without any."""
    from longctx.train.checkpoint import CHECKPOINTS  # which imports this module

    names = [path.name for path in (out / CHECKPOINTS).glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    """The fields in which two dataclasses differ, down to the last one."""
    if old == new:
        return
    if not dataclasses.is_dataclass(old) or type(old) is not type(new):
        yield f"{name} {old!r} -> {new!r}"
        return
    for field in dataclasses.fields(old):
        yield from _changes(
            getattr(old, field.name), getattr(new, field.name), f"{name}.{field.name}"
        )


def write_config(config: RunConfig, out: pathlib.Path) -> None:
    """Write config.json, which makes `out` the directory of this run."""
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")


def read_config(out: pathlib.Path) -> RunConfig:
    """The configuration of the run in `out`.

    Raises:
      RunError: `out` is not a run, or not one of this version.
    """
    path = out / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{out} is not a run: it has no {CONFIG_FILE}")
    with told_as(RunError, where=f"{path} cannot be read"):
        return from_json(RunConfig, json.loads(path.read_text()))
