"""What a run reads."""

import dataclasses
from typing import Literal

from longctx.errors import UserError

STDLIB = "python-stdlib"

type Split = Literal["train", "valid"]
type Document = tuple[str, bytes]  # a name that does not depend on the machine, and the text


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into sequences."""

    # "python-stdlib" (source text of the running Python's standard library), or the path of a
    # text file, a .jsonl or .parquet file, any of these with .gz, or a directory of such files; or
    # "task:NAME", the episodes of a task of longctx.tasks (of several in turn: "task:NAME+NAME";
    # "NAME@64": episodes of 64 tokens, packed), of whose tokens only answers count; or
    # "NAME:PATH", a published corpus of longctx.data.corpora at a path of yours.
    source: str = STDLIB
    # Held-out text, same forms as `source`; empty: documents of `source` chosen by a fixed hash.
    valid_source: str = ""
    # Share of the documents held out when `valid_source` is empty.
    valid_fraction: float = 0.05
    # Field (.jsonl) or column (.parquet) that holds the text.
    text_field: str = "text"
    # "bytes" (256 values and one document boundary), or the path of a tokenizer.json.
    tokenizer: str = "bytes"
    # Tokens per training sequence (the 1024 is author code's).
    sequence_length: int = 1024
    # Sequences per optimizer step, over all processes and accumulation steps (the 32 is ours).
    batch_size: int = 32
    # Seed of the order of the sequences, which is new in each epoch.
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.valid_fraction={self.valid_fraction} must lie between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed} must lie in [0, 2**32)")


class DataError(UserError):
    """The data cannot serve the run: a missing path, an empty file, too few tokens."""
