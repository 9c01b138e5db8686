"""Hugging Face folders: Llama, Mistral and TransNormerLLM, in and out (extra `hf`)."""

from longctx.hf.config import from_hf, to_hf
from longctx.hf.io import load_hf, save_hf

__all__ = ["from_hf", "load_hf", "save_hf", "to_hf"]
