"""TransNormerLLM / TNL: arXiv 2307.14995 and 2405.17381."""
