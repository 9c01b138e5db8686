"""The held-out score: bits per byte at a sequence length, and by tokens of context."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from longctx.data.episodes import EpisodeRows, Episodes
from longctx.data.packing import Corpus, Example, Windows
from longctx.data.pipeline import stack
from longctx.eval.nll import MODEL_FIELDS, token_nll
from longctx.parallel.layout import Kind, Layout, as_layout
from longctx.parallel.mesh import BATCH

# Contexts shorter than this form one bucket; each further bucket is as wide as all before it.
FIRST_BUCKET = 64

# Tokens per call of the model, or one sequence if that is longer.
BATCH_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Targets predicted from `first` to `last` earlier tokens of their document."""

    first: int
    last: int
    tokens: int
    bits_per_byte: float | None  # None if there are no such targets


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a model at one sequence length."""

    length: int
    tokens: int
    bits_per_byte: float
    buckets: tuple[Bucket, ...]


type Scorer = Callable[[nnx.State, nnx.State], Score]


def make_scorer(
    graph: nnx.GraphDef,
    corpus: Corpus | Episodes,
    length: int,
    *,
    tokens: int,
    mesh: Mesh,
    block: int | None = None,
    layout: Layout | Kind = "contiguous",
) -> Scorer:
    """A function of (parameters, other variables) that scores the model on part of a corpus.

    The part is `tokens` long (at least one block) and made of evenly spread blocks of `block`
    tokens, cut into sequences of `length`: scorers that differ in length only see the same text.

    Args:
      graph: structure of the model.
      corpus: what is scored.
      length: tokens per sequence, a divisor of `block` (default: `length` itself).
      tokens: how much of the corpus is scored.
      mesh: over which batch and sequences are split.
      layout: of the tokens of a sequence over the mesh axis `seq`.

    Raises:
      ValueError: `length` does not divide `block`, or the corpus is shorter than a block.
    """
    block = block or length
    if block % length:
        raise ValueError(f"{length=} must divide {block=}")
    rows = _spread_rows(len(corpus.windows(block)), max(1, tokens // block), block // length)
    windows = corpus.windows(length)
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    batch_size = shards * max(1, BATCH_TOKENS // (length * shards))
    bounds = _bounds(length)
    bits_per_nat = 1 / (math.log(2) * corpus.bytes_per_token)
    sharding, order = NamedSharding(mesh, P(BATCH, "seq")), as_layout(layout, mesh.shape["seq"])

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def bucket_sums(
        params: nnx.State, rest: nnx.State, batch: dict[str, Int[Array, "B T"]]
    ) -> Float[Array, "2 K"]:
        nll = token_nll(nnx.merge(graph, params, rest), batch)
        context = batch["positions"]
        bucket = jnp.searchsorted(jnp.asarray(bounds[1:]), context, side="right")
        counted = batch["targets"] >= 0
        member = (bucket[..., None] == jnp.arange(len(bounds))[None, None]) & counted[..., None]
        return jnp.stack([jnp.sum(nll[..., None] * member, (0, 1)), jnp.sum(member, (0, 1))])

    def score(params: nnx.State, rest: nnx.State) -> Score:
        total = np.zeros((2, len(bounds)))
        for batch in _batches(windows, rows, batch_size):
            placed = {f: _put(order.apply(batch[f]), sharding) for f in MODEL_FIELDS}
            total += jax.device_get(bucket_sums(params, rest, placed))
        nats, counts = total
        buckets = tuple(
            Bucket(first, last - 1, int(n), float(s / n * bits_per_nat) if n else None)
            for first, last, s, n in zip(bounds, [*bounds[1:], length], nats, counts, strict=True)
        )
        mean = float(nats.sum() / counts.sum() * bits_per_nat)
        return Score(length, int(counts.sum()), mean, buckets)

    return score


def _bounds(length: int) -> list[int]:
    """First context of each bucket: 0, 64, 128, 256, ... below `length`."""
    bounds, bound = [0], FIRST_BUCKET
    while bound < length:
        bounds.append(bound)
        bound *= 2
    return bounds


def _spread_rows(blocks: int, wanted: int, parts: int) -> Int[np.ndarray, " R"]:
    """Sequence numbers of `wanted` evenly spread blocks of `parts` sequences each."""
    chosen = np.linspace(0, blocks - 1, min(wanted, blocks)).astype(int)
    return (chosen[:, None] * parts + np.arange(parts)[None, :]).reshape(-1)


def _batches(
    windows: Windows | EpisodeRows, rows: Int[np.ndarray, " R"], size: int
) -> Iterator[Example]:
    """The sequences in batches of one size; the last is filled up with rows that do not count."""
    for first in range(0, len(rows), size):
        examples = [windows[row] for row in rows[first : first + size]]
        blank = examples[0] | {"targets": np.full_like(examples[0]["targets"], -1)}
        yield stack(examples + [blank] * (size - len(examples)))


def _put(array: np.ndarray, sharding: NamedSharding) -> Array:
    """A host array that every process has, as a global array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
