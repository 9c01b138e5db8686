"""Activation of the gated linear unit: none (SGLU) does no worse than Swish.

Claim (2405.17381, table 9): none 2.248, Swish 2.254.
Command: longctx reproduce experiments/transnormer/glu_activation.py --scale small
Expected: a difference of 0.006 bits per token in the paper, too small for one seed.
"""

import dataclasses

from experiments.transnormer.base import ablation, model
from longctx.reproduce import Arm
from longctx.train.config import RunConfig


def swish(run: RunConfig) -> RunConfig:
    """SwiGLU in place of SGLU."""
    return model(run, mlp=dataclasses.replace(run.model.mlp, activation="silu"))


EXPERIMENT = ablation(
    "Activation of the GLU",
    "table 9",
    base="none",
    arms={"none": Arm(paper=2.248), "Swish": Arm(paper=2.254, change=swish)},
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
