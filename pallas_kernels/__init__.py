"""Kernel families for long-context attention. Needs only jax, numpy and jaxtyping."""

from pallas_kernels import flash_attention as flash_attention
from pallas_kernels import lightning_attention as lightning_attention
