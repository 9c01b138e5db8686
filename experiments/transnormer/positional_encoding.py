"""Positional encoding: LRPE-d in the first layer only costs little against LRPE-d everywhere.

Claim (2405.17381, table 4): LRPE-d < Mix < exponential decay < LRPE << absolute positions.
Command: longctx reproduce experiments/transnormer/positional_encoding.py --scale small
Expected: absolute positions worst by far (0.139 bits per token); the rest within 0.04.
"""

import functools

from experiments.transnormer.base import ablation, lightning, model
from longctx.reproduce import Arm
from longctx.train.config import RunConfig


def absolute(run: RunConfig) -> RunConfig:
    """A learned table instead of decay and rotation."""
    return lightning(model(run, learned_positions=run.data.sequence_length), position="absolute")


def position(name: str):
    """Another choice of `LightningConfig.position`."""
    return functools.partial(lightning, position=name)


EXPERIMENT = ablation(
    "Positional encoding",
    "table 4",
    base="Mix",
    arms={
        "Mix": Arm(paper=2.248),
        "APE": Arm(paper=2.387, change=absolute),
        "Exp-Decay": Arm(paper=2.267, change=position("exp_decay")),
        "LRPE": Arm(paper=2.287, change=position("lrpe")),
        "LRPE-d": Arm(paper=2.236, change=position("lrpe_d")),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
