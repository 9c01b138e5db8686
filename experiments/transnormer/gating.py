"""Gating: the gate of the linear attention lowers the loss.

Claim (2405.17381, table 6): with gate 2.248 (385M), without 2.263 (379M, its SGLU 3 x width).
Command: longctx reproduce experiments/transnormer/gating.py --scale small
Expected: with below without, by 0.015 bits per token in the paper.
"""

import dataclasses

from experiments.transnormer.base import ablation
from longctx.models import without_gate
from longctx.reproduce import Arm

EXPERIMENT = ablation(
    "Gating",
    "table 6",
    base="with gate",
    arms={
        "with gate": Arm(paper=2.248),
        "without gate": Arm(
            paper=2.263,
            change=lambda run: dataclasses.replace(run, model=without_gate(run.model)),
        ),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
