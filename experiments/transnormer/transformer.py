"""TransNormerLLM against a softmax Transformer of the same size.

Claim (2405.17381, table 11): Transformer-385M 2.362, TNL-385M 2.248. (The larger pair of the table
is in transformer_1b.py.)
Command: longctx reproduce experiments/transnormer/transformer.py --scale small
Expected: TNL below the Transformer, by 0.114 bits per token in the paper.
"""

import dataclasses

from experiments.transnormer.base import ablation
from longctx.models import transformer
from longctx.reproduce import Arm
from longctx.train.config import RunConfig


def softmax(run: RunConfig) -> RunConfig:
    """The Transformer of the run's shape."""
    return dataclasses.replace(run, model=transformer(run.model))


EXPERIMENT = ablation(
    "Transformer and TNL",
    "table 11",
    base="TNL",
    arms={
        "TNL": Arm(paper=2.248),
        "Transformer": Arm(paper=2.362, change=softmax),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
