"""Flax NNX modules: mixers, channel mixers, norms, positions, blocks and stacks, the loss.

Each also works in a Linen model through `flax.nnx.bridge`.
"""

from longctx.nn.attention import RingAttention, SelfAttention
from longctx.nn.cache import Cache
from longctx.nn.lightning import Constant, LightningAttention
from longctx.nn.linear import Embedding, Linear
from longctx.nn.loss import chunked_cross_entropy
from longctx.nn.mlp import GLU, MLP
from longctx.nn.norm import LayerNorm, RMSNorm, SRMSNorm, make_norm
from longctx.nn.position import LRPE, RopeScaling, rope_frequencies, token_positions
from longctx.nn.sharding import Axes
from longctx.nn.sparse import DropAttention, HashAttention, TiedAttention
from longctx.nn.stack import Block, Mixer, Segment, Stack
from longctx.nn.tensorized import TensorizedAttention

__all__ = [
    "GLU",
    "LRPE",
    "MLP",
    "Axes",
    "Block",
    "Cache",
    "Constant",
    "DropAttention",
    "Embedding",
    "HashAttention",
    "LayerNorm",
    "LightningAttention",
    "Linear",
    "Mixer",
    "RMSNorm",
    "RingAttention",
    "RopeScaling",
    "SRMSNorm",
    "Segment",
    "SelfAttention",
    "Stack",
    "TensorizedAttention",
    "TiedAttention",
    "chunked_cross_entropy",
    "make_norm",
    "rope_frequencies",
    "token_positions",
]
