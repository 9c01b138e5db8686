"""Normalization: SRMSNorm, which has no weights, does as well as RMSNorm and LayerNorm.

Claim (2405.17381, table 7): SRMSNorm 2.248, RMSNorm 2.247, LayerNorm 2.247: no difference.
Command: longctx reproduce experiments/transnormer/normalization.py --scale small
Expected: differences within the noise between seeds.
"""

from experiments.transnormer.base import ablation, lightning, model
from longctx.nn.norm import NormKind
from longctx.reproduce import Arm
from longctx.train.config import RunConfig


def norm(kind: NormKind):
    """Another norm in every place."""

    def change(run: RunConfig) -> RunConfig:
        return lightning(model(run, norm=kind), norm=kind)

    return change


EXPERIMENT = ablation(
    "Normalization",
    "table 7",
    base="SRMSNorm",
    arms={
        "SRMSNorm": Arm(paper=2.248),
        "RMSNorm": Arm(paper=2.247, change=norm("rms")),
        "LayerNorm": Arm(paper=2.247, change=norm("layer")),
    },
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")
