"""Named architectures: TransNormerLLM, the Transformer beside it, GPT-2, hybrids."""

from longctx.models.config import (
    LightningConfig,
    MlpConfig,
    ModelConfig,
    ParallelConfig,
    ResidualConfig,
    SoftmaxConfig,
)
from longctx.models.decoder import Decoder, build, count_parameters
from longctx.models.named import BYTE_VOCAB, MODELS, tnl, transformer, without_gate

__all__ = [
    "BYTE_VOCAB",
    "MODELS",
    "Decoder",
    "LightningConfig",
    "MlpConfig",
    "ModelConfig",
    "ParallelConfig",
    "ResidualConfig",
    "SoftmaxConfig",
    "build",
    "count_parameters",
    "tnl",
    "transformer",
    "without_gate",
]
