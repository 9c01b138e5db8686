"""Named runs, for `longctx train NAME`: a table of complete configurations."""

from longctx.data.config import DataConfig
from longctx.models import MODELS
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

# A small TransNormerLLM on the standard library's source text, for two CPU cores (ours).
QUICKSTART = RunConfig(
    model=MODELS["tnl-tiny"],
    data=DataConfig(sequence_length=256, batch_size=8),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=1000, log_every=50, checkpoint_every=500),
    eval=EvalConfig(every=250),
)

RUNS: dict[str, RunConfig] = {"quickstart": QUICKSTART}
