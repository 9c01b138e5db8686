"""Attention tensorization: arXiv 2410.20926."""
