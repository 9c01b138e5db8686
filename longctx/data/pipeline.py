"""The input pipeline: shuffled batches, the same for any number of processes, resumable."""

from collections.abc import Sequence

import grain
import numpy as np

from longctx.data.config import DataConfig, DataError, Split
from longctx.data.episodes import PREFIX, Episodes, load_episodes
from longctx.data.packing import Corpus, Example, pack
from longctx.data.sources import documents
from longctx.data.tokenizer import load_tokenizer


def load_corpus(config: DataConfig, split: Split, *, vocab_size: int) -> Corpus | Episodes:
    """Read, tokenize and pack one split; or the episodes of a task.

    Args:
      config: the source, its split and its tokenizer.
      split: "train" or "valid".
      vocab_size: what the model has embeddings for.

    Raises:
      DataError: the source cannot be read or is empty, or holds a token that the model lacks; or
        `valid_source` is given beside a task.
    """
    if config.source.startswith(PREFIX):
        if config.valid_source:
            raise DataError(
                f"data.valid_source={config.valid_source} must be empty: "
                f"data.source={config.source} has held-out episodes of its own"
            )
        return load_episodes(config, split, vocab_size=vocab_size)
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = pack(documents(config, split), tokenizer, split)
    largest = int(corpus.tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"token {largest} of the {split} split is outside the vocabulary: "
            f"model.vocab_size={vocab_size}, data.tokenizer={config.tokenizer} "
            f"needs {tokenizer.vocab_size}"
        )
    return corpus


def train_batches(
    corpus: Corpus | Episodes, config: DataConfig, *, part: int = 0, parts: int = 1
) -> grain.DatasetIterator:
    """Endless shuffled batches of `Example`, the rows of one part of each.

    The union of the rows over the parts does not depend on their number. The order is a
    function of `config.seed`, new in each pass over the corpus. `get_state` and `set_state` of
    the iterator resume it exactly.

    Raises:
      DataError: the corpus is shorter than a sequence, or the batch does not divide.
    """
    if config.batch_size % parts:
        raise DataError(f"data.batch_size={config.batch_size} must divide by {parts} processes")
    rows = grain.MapDataset.source(corpus.windows(config.sequence_length))
    rows = rows.shuffle(seed=config.seed).repeat()[part::parts]
    # There is no last batch; without drop_remainder grain loses count of batches of one.
    batches = rows.batch(config.batch_size // parts, drop_remainder=True, batch_fn=stack)
    # Reading is slicing an array: one thread that stays two batches ahead is enough.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.to_iter_dataset(options))


def stack(rows: Sequence[Example]) -> Example:
    """The batch of some examples."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
