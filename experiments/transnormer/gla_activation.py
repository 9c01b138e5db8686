"""Activation of q and k: Swish beats none; 1 + elu is close but diverged at 7B in the paper.

Claim (2405.17381, table 8): Swish 2.248, 1 + elu 2.252, none 2.283.
Command: longctx reproduce experiments/transnormer/gla_activation.py --scale small
Expected: none worst, by 0.035 bits per token in the paper.
"""

import functools

from experiments.transnormer.base import ablation, lightning
from longctx.reproduce import Arm

EXPERIMENT = ablation(
    "Activation of q and k",
    "table 8",
    base="Swish",
    arms={
        "Swish": Arm(paper=2.248),
        "none": Arm(paper=2.283, change=functools.partial(lightning, activation="none")),
        "1 + elu": Arm(paper=2.252, change=functools.partial(lightning, activation="elu1")),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
