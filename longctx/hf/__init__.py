"""Hugging Face folders: Llama, Mistral, TransNormerLLM and MiniMax-01 in and out (extra `hf`)."""

from longctx.hf.architectures import from_hf, to_hf
from longctx.hf.io import is_hf_folder, load_hf, read_hf_config, save_hf

__all__ = ["from_hf", "is_hf_folder", "load_hf", "read_hf_config", "save_hf", "to_hf"]
