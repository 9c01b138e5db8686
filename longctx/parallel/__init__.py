"""What crosses devices: the mesh, token layouts and attention over sharded sequences."""

from longctx.parallel.context import context_attention
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import AXES, BATCH, MeshConfig, make_mesh, shard_operator

__all__ = [
    "AXES",
    "BATCH",
    "Layout",
    "MeshConfig",
    "context_attention",
    "make_mesh",
    "shard_operator",
]
