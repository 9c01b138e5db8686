"""Attention at the level of arrays: sparse, tensorized, over caches; no module, no kernel."""

from longctx.attention.sparse import hash_sparse_attention, qk_sparse_attention
from longctx.attention.tensorized import tensorized_attention

__all__ = ["hash_sparse_attention", "qk_sparse_attention", "tensorized_attention"]
