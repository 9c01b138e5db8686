"""Named runs, for `longctx train NAME`: a table of complete configurations."""

import dataclasses

from longctx.data.config import DataConfig
from longctx.models import MODELS, LightningConfig, MlpConfig
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig

# A TransNormerLLM of 1.8M parameters on the standard library's source text, for three minutes on
# two CPU cores. All numbers are ours: wide and shallow makes products large enough for a CPU, and
# batches of a thousand tokens make the most of the one million that there is time for.
QUICKSTART = RunConfig(
    model=dataclasses.replace(
        MODELS["tnl-tiny"],
        width=256,
        num_layers=2,
        lightning=LightningConfig(num_heads=4, head_dim=64),
        mlp=MlpConfig(width=704),
    ),
    data=DataConfig(sequence_length=256, batch_size=4),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=40, final_fraction=0.05, beta2=0.98),
    train=TrainConfig(steps=1000, log_every=25, checkpoint_every=500),
    eval=EvalConfig(every=250, tokens=2**15),
)

# Every named model is a run too, to be given data and a schedule on the command line.
RUNS: dict[str, RunConfig] = {
    "quickstart": QUICKSTART,
    **{name: RunConfig(model=model) for name, model in MODELS.items()},
}
