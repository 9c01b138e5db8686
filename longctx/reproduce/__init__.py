"""Running the papers' experiments: what one is, and how its results are written down."""

from longctx.reproduce.ablation import SCALES, Ablation, Arm, trained
from longctx.reproduce.experiment import Experiment, Row, load, reproduce

__all__ = ["SCALES", "Ablation", "Arm", "Experiment", "Row", "load", "reproduce", "trained"]
