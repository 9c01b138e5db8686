"""Tokens of a text: its bytes, or the vocabulary of a tokenizer.json."""

import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from longctx.data.config import DataError
from longctx.errors import told_as

# Tokens that tokenizer.json files use for the boundary between documents, the likeliest first.
BOUNDARY_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<s>", "<eos>")


class Tokenizer(Protocol):
    """What the pipeline, evaluation and generation need of a vocabulary.

    Every document starts with the token `boundary`, which thereby also ends the document before.
    """

    boundary: int
    vocab_size: int

    def encode(self, text: bytes) -> Int[np.ndarray, " T"]:
        """Tokens of one document, without the boundary."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; boundaries are left out, invalid UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 byte values, and 256 as the boundary between documents."""

    boundary = 256
    vocab_size = 257

    def encode(self, text: bytes) -> Int[np.ndarray, " T"]:
        """The bytes themselves."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes; tokens that are none, as padded vocabularies have, are left out."""
        return bytes(t for t in tokens if t < self.boundary).decode(errors="replace")


class FileTokenizer:
    """The vocabulary of a tokenizer.json, through the `tokenizers` package (extra `text`)."""

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise DataError(
                f"data.tokenizer={path} needs the extra: pip install longctx[text]"
            ) from None
        if not pathlib.Path(path).is_file():
            raise DataError(f"data.tokenizer={path} is neither 'bytes' nor an existing file")
        with told_as(DataError, where=f"data.tokenizer={path} is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(pathlib.Path(path).read_bytes())
        # Identifiers may have gaps, so the count is not the size that the embedding needs.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        found = [self._tokenizer.token_to_id(name) for name in BOUNDARY_NAMES]
        known = [token for token in found if token is not None]
        if not known:
            raise DataError(f"{path} has none of the boundary tokens {', '.join(BOUNDARY_NAMES)}")
        self.boundary = known[0]

    def encode(self, text: bytes) -> Int[np.ndarray, " T"]:
        """Tokens of UTF-8 text; undecodable bytes become U+FFFD."""
        encoding = self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        return np.asarray(encoding.ids, np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `DataConfig.tokenizer`: "bytes" or the path of a tokenizer.json.

    Raises:
      DataError: the file or the `tokenizers` package is missing, or the vocabulary has no token
        that can separate documents.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def decode_behind(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` behind `prompt`: alone, some tokenizers would strip a space before it."""
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(list(prompt))) :]
