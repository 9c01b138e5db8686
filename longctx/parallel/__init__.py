"""What crosses devices: the mesh, token layouts and attention over sharded sequences."""

from longctx.parallel.context import context_attention
from longctx.parallel.cost import explain
from longctx.parallel.lasp import context_lightning
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import AXES, BATCH, MeshConfig, make_mesh, shard_operator
from longctx.parallel.overlap import verify_overlap

__all__ = [
    "AXES",
    "BATCH",
    "Layout",
    "MeshConfig",
    "context_attention",
    "context_lightning",
    "explain",
    "make_mesh",
    "shard_operator",
    "verify_overlap",
]
