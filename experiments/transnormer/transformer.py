"""TransNormerLLM against a softmax Transformer of the same size.

Claim (2405.17381, table 11): Transformer-385M 2.362, TNL-385M 2.248.
Command: longctx reproduce experiments/transnormer/transformer.py --scale small
Expected: TNL below the Transformer, by 0.114 bits per token in the paper.
"""

import dataclasses

from experiments.transnormer.base import ablation
from longctx.models import transformer
from longctx.reproduce import Arm

EXPERIMENT = ablation(
    "Transformer and TNL",
    "table 11",
    base="TNL",
    arms={
        "TNL": Arm(paper=2.248),
        "Transformer": Arm(
            paper=2.362,
            change=lambda run: dataclasses.replace(run, model=transformer(run.model)),
        ),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
