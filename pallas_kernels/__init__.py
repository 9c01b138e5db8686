"""Kernel families for long-context attention. Needs only jax, numpy and jaxtyping."""

from pallas_kernels import lightning_attention as lightning_attention
