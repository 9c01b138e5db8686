"""Decay temperature: slower decay in later layers lowers the loss a little.

Claim (2405.17381, table 5): with temperature 2.248, without 2.258.
Command: longctx reproduce experiments/transnormer/decay_temperature.py --scale small
Expected: with below without, by 0.010 bits per token in the paper; one seed cannot resolve that.
"""

import functools

from experiments.transnormer.base import ablation, lightning
from longctx.reproduce import Arm

EXPERIMENT = ablation(
    "Decay temperature",
    "table 5",
    base="with temperature",
    arms={
        "with temperature": Arm(paper=2.248),
        "without temperature": Arm(
            paper=2.258, change=functools.partial(lightning, temperature=False)
        ),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
