"""Lightning attention: linear attention with one decay per head and a carried state."""

from pallas_kernels.lightning_attention.api import (
    lightning_attention,
    lightning_dstate,
    lightning_pieces,
    lightning_state,
    lightning_step,
)
from pallas_kernels.lightning_attention.decay import alibi_log_decay, printed_log_decay

__all__ = [
    "alibi_log_decay",
    "lightning_attention",
    "lightning_dstate",
    "lightning_pieces",
    "lightning_state",
    "lightning_step",
    "printed_log_decay",
]
