"""Running the papers' experiments: what one is, and how its results are written down."""

from longctx.reproduce.ablation import SCALES, Ablation, Arm
from longctx.reproduce.experiment import Divided, Whole, load
from longctx.reproduce.many import reproduce
from longctx.reproduce.part import Part, Row, held_out

__all__ = [
    "SCALES",
    "Ablation",
    "Arm",
    "Divided",
    "Part",
    "Row",
    "Whole",
    "held_out",
    "load",
    "reproduce",
]
