"""Documents packed into one stream of tokens, and fixed windows of that stream."""

import dataclasses
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress

from longctx.data.config import DataError, Document, Split
from longctx.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Packed documents, each starting with the boundary token."""

    tokens: Int[np.ndarray, " L"]
    starts: Int[np.ndarray, " G"]  # where each document's boundary stands, ascending
    text_bytes: int
    split: Split = "train"  # only named in errors

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token: bits per byte = nats per token / ln 2 / this."""
        return self.text_bytes / len(self.tokens)

    def windows(self, length: int) -> "Windows":
        """Its sequences of `length` tokens."""
        return Windows(self, length)

    def __str__(self) -> str:
        return f"{len(self.tokens):,} training tokens"


# One sequence, or with a leading axis B a batch of them, by field:
#   tokens     int32 [T]
#   targets    int32 [T]  the next token (of a document's last token, the boundary); -1: no target
#   doc_start  int32 [T]  position, in this sequence, of the first token of the token's document
#   positions  int32 [T]  how many tokens of its document stand before the token
#   index      int64 []   which window of the corpus this is
type Example = dict[str, np.ndarray]


def pack(documents: Sequence[Document], tokenizer: Tokenizer, split: Split = "train") -> Corpus:
    """Concatenate the tokens of the documents, each after a boundary; a terminal shows a bar."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    boundary = np.array([tokenizer.boundary], dtype)
    parts, starts, length = [], [], 0
    text_bytes = sum(len(text) for _, text in documents)
    # A console of its own: Rich may refuse a second live display on one that has a display.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=text_bytes)
        for _, text in documents:
            tokens = tokenizer.encode(text)
            starts.append(length)
            parts += [boundary, tokens.astype(dtype)]
            length += 1 + len(tokens)
            progress.advance(task, len(text))
    return Corpus(np.concatenate(parts), np.array(starts), text_bytes, split)


class Windows:
    """Random access to the `length`-token sequences of a corpus: a grain source.

    Sequence i reads tokens [i T, i T + T] so that every token is a target once per pass. A
    document that began before the sequence counts as starting with it: nothing is carried over.
    """

    def __init__(self, corpus: Corpus, length: int) -> None:
        count = (len(corpus.tokens) - 1) // length
        if count < 1:
            raise DataError(
                f"a sequence of {length} tokens and its targets is longer than the {corpus.split} "
                f"split of {len(corpus.tokens)} tokens: lower data.sequence_length (in an "
                "evaluation its lengths), change data.valid_fraction or give data.valid_source"
            )
        self._corpus = corpus
        self._length = length
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = int(index)
        first, last = index * self._length, (index + 1) * self._length
        tokens = self._corpus.tokens[first : last + 1].astype(np.int32)
        doc_start = np.zeros(self._length, np.int32)
        inside = np.searchsorted(self._corpus.starts, [first, last])
        starts = self._corpus.starts[slice(*inside)] - first
        doc_start[starts] = starts
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "doc_start": (doc_start := np.maximum.accumulate(doc_start)),
            "positions": np.arange(self._length, dtype=np.int32) - doc_start,
            "index": np.asarray(index),
        }
