"""Hybrids of linear and softmax attention: MiniMax-01, arXiv 2501.08313."""
