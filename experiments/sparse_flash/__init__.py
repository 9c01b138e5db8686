"""Sparse Flash Attention: arXiv 2306.01160."""
