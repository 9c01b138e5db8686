"""Softmax attention where every row sees one interval of keys; see this folder's README."""

from pallas_kernels.flash_attention.api import (
    block_backward,
    block_forward,
    flash_attention,
    merge,
    ring_backward,
    ring_forward,
    row_delta,
)
from pallas_kernels.flash_attention.tiles import Ring, Spec, Tiles

__all__ = [
    "Ring",
    "Spec",
    "Tiles",
    "block_backward",
    "block_forward",
    "flash_attention",
    "merge",
    "ring_backward",
    "ring_forward",
    "row_delta",
]
