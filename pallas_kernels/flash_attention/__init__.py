"""Softmax attention where every row sees one interval of keys; see this folder's README."""

from pallas_kernels.flash_attention.api import (
    block_backward,
    block_forward,
    flash_attention,
    merge,
    row_delta,
)
from pallas_kernels.flash_attention.pieces import Pieces
from pallas_kernels.flash_attention.tiles import Spec, Tiles

__all__ = [
    "Pieces",
    "Spec",
    "Tiles",
    "block_backward",
    "block_forward",
    "flash_attention",
    "merge",
    "row_delta",
]
