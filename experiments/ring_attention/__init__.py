"""Ring Attention: arXiv 2310.01889."""
