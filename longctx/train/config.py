"""What a run is: one frozen dataclass per concern, all of it in the run's `config.json`."""

import dataclasses
from typing import Literal

from longctx.data.config import DataConfig
from longctx.models import ModelConfig
from longctx.models.config import ParallelConfig
from longctx.parallel.layout import as_layout
from longctx.parallel.mesh import MeshConfig

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
