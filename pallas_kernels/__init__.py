"""Kernel families for long-context attention. Needs only jax, numpy and jaxtyping."""
