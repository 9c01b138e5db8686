"""TransNormerLLM against a softmax Transformer of the same size, at two sizes.

Claim (2405.17381, table 11): Transformer-385M 2.362, TNL-385M 2.248; Transformer-1B 2.061, TNL-1B
1.896. (The perplexity printed for Transformer-1B, 4.765, does not belong to that loss.)
Command: longctx reproduce experiments/transnormer/transformer.py --scale small
Expected: TNL below the Transformer, by 0.114 bits per token at 385M and 0.165 at 1B in the paper.
"""

import dataclasses

from experiments.transnormer.base import ablation, model
from longctx.models import transformer
from longctx.reproduce import Arm
from longctx.train.config import RunConfig


def softmax(run: RunConfig) -> RunConfig:
    """The Transformer of the run's shape."""
    return dataclasses.replace(run, model=transformer(run.model))


def larger(run: RunConfig) -> RunConfig:
    """From the 385M's shape to the 1B's: twice the width, two thirds of the layers."""
    old = run.model
    return model(
        run,
        width=2 * old.width,
        num_layers=old.num_layers * 2 // 3,
        lightning=dataclasses.replace(old.lightning, num_heads=2 * old.lightning.num_heads),
        mlp=dataclasses.replace(old.mlp, width=2 * old.mlp.width),
    )


EXPERIMENT = ablation(
    "Transformer and TNL",
    "table 11",
    base="TNL",
    arms={
        "TNL": Arm(paper=2.248),
        "Transformer": Arm(paper=2.362, change=softmax),
        "TNL, larger": Arm(paper=1.896, change=larger),
        "Transformer, larger": Arm(paper=2.061, change=lambda run: softmax(larger(run))),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
