"""Tensorized attention (2410.20926): attention along the dimensions of a folded sequence."""

from longctx.attention.tensorized.api import Variant, tensorized_attention
from longctx.attention.tensorized.cache import ring_lengths, tensorized_cache_attention
from longctx.attention.tensorized.mixed_radix import Dims, Hop, Order, Positions, make_hops
from longctx.attention.tensorized.shards import sharded_mixed_radix

__all__ = [
    "Dims",
    "Hop",
    "Order",
    "Positions",
    "Variant",
    "make_hops",
    "ring_lengths",
    "sharded_mixed_radix",
    "tensorized_attention",
    "tensorized_cache_attention",
]
