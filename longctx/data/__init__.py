"""Text in, packed token windows out: sources, tokenizers, packing and the input pipeline."""
