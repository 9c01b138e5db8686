"""What the experiments of 2410.20926 share: models, arms, scores by length and place in a block."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from longctx.data.pipeline import load_corpus, stack
from longctx.eval.lengths import evaluate
from longctx.eval.nll import MODEL_FIELDS, token_nll
from longctx.models import BYTE_VOCAB, MlpConfig, ModelConfig, SoftmaxConfig
from longctx.models.config import TensorizedConfig
from longctx.parallel.mesh import make_mesh
from longctx.reproduce import Arm, Row
from longctx.train.config import RunConfig
from longctx.train.restore import load_run


@dataclasses.dataclass(frozen=True)
class Paper:
    """All the numbers of 2410.20926 that could be read (abstract)."""

    trained_length: int = 32768
    steady_to: int = 131072  # tokens up to which perplexity is said to stay
    speedup: float = 11.0  # over full attention at `steady_to`; of what is not said


PAPER = Paper()


def llama(
    width: int, layers: int, heads: int, fast: int, *, dtype: str = "bfloat16"
) -> ModelConfig:
    """A small model of Llama's shape on bytes; `fast` is n_1, and the window of the window arm."""
    return ModelConfig(
        vocab_size=BYTE_VOCAB,
        width=width,
        num_layers=layers,
        mixers=("softmax",),
        softmax=SoftmaxConfig(
            num_heads=heads, num_kv_heads=max(1, heads // 2), head_dim=width // heads, window=fast
        ),
        tensorized=TensorizedConfig(dims=(fast, None)),
        mlp=MlpConfig(width=8 * width // 3 // 64 * 64 or 64, activation="silu"),
        norm="rms",
        scale_embedding=False,
        dtype=dtype,
    )


def mixer(run: RunConfig, name: str, fast: int | None = None) -> RunConfig:
    """`run` with another mixer, and another window and n_1 if `fast` is given."""
    model = dataclasses.replace(run.model, mixers=(name,))
    if fast is not None:
        softmax = dataclasses.replace(model.softmax, window=fast)
        tensorized = dataclasses.replace(model.tensorized, dims=(fast, None))
        model = dataclasses.replace(model, softmax=softmax, tensorized=tensorized)
    return dataclasses.replace(run, model=model)


def folded(run: RunConfig, parts: int = 2, **changes: Any) -> RunConfig:
    """`run` with tensorized attention; three parts split n_1 in two."""
    fast = run.model.softmax.window
    dims = (fast, None) if parts == 2 else (fast // 4, 4, None)
    if changes.get("variant") in ("dominance", "hierarchical"):
        changes["self_bias"] = None
    tensorized = TensorizedConfig(dims=dims, **changes)
    return mixer(
        dataclasses.replace(run, model=dataclasses.replace(run.model, tensorized=tensorized)),
        "tensorized",
    )


def _folded(**changes: Any) -> Arm:
    return Arm(change=functools.partial(folded, **changes))


ARMS: Mapping[str, Arm] = {
    "dense": Arm(),
    "window": Arm(change=functools.partial(mixer, name="window")),
    "mixed radix": _folded(),
    "mixed radix, fast first": _folded(order="fast_first"),
    "mixed radix, global positions": _folded(positions="global"),
    "mixed radix, no self-edge bias": _folded(self_bias=None),
    "mixed radix, 3 dimensions": _folded(parts=3),
    "hierarchical": _folded(variant="hierarchical"),
    "dominance": _folded(variant="dominance"),
}


def by_length(
    row: Row, run: Path, lengths: Sequence[int], *, trained: int, tokens: int
) -> list[Row]:
    """`row` once for each length, with the score of the run there: the whole, and by context."""
    scores = evaluate(run, lengths, tokens=tokens)
    return [{**row, "trained": trained, **dataclasses.asdict(score)} for score in scores]


def by_place(run: Path, block: int, *, tokens: int) -> list[dict[str, float]]:
    """Held-out bits per byte by position in a block of `block` tokens, at the trained length.

    Positions in buckets 0, 1, 2-3, 4-7, ...; the first block of each row, where there is nothing
    before, is left out.
    """
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        loaded = load_run(run, mesh)
        data = loaded.config.data
        corpus = load_corpus(data, "valid", vocab_size=loaded.config.model.vocab_size)

        @jax.jit
        def losses(params, rest, batch):
            return token_nll(nnx.merge(loaded.graph, params, rest), batch)

        windows = corpus.windows(data.sequence_length)
        count = min(len(windows), max(1, tokens // data.sequence_length))
        bucket = np.frexp(np.arange(data.sequence_length) % block)[1]  # 0, 1, 2, 2, 3, 3, 3, 3, ...
        total = np.zeros((2, bucket.max() + 1))
        for index in np.linspace(0, len(windows) - 1, count).astype(int):
            example = stack([windows[index]])
            nll = losses(loaded.params, loaded.rest, {f: example[f] for f in MODEL_FIELDS})
            counted = (example["targets"][0] >= 0) & (np.arange(len(bucket)) >= block)
            total[0] += np.bincount(bucket, np.asarray(nll[0]) * counted, len(total[0]))
            total[1] += np.bincount(bucket, counted, len(total[1]))
    bits = total[0] / np.maximum(total[1], 1) / math.log(2) / corpus.bytes_per_token
    return [
        {"first": 2**b // 2, "last": max(2**b - 1, 0), "tokens": n, "bits_per_byte": x}
        for b, (n, x) in enumerate(zip(total[1].tolist(), bits.tolist(), strict=True))
    ]


def arms_table(rows: Sequence[Row], column: str, value: str, digits: int = 4) -> list[str]:
    """The `value` of each row: a line per arm and seed, a column for all there is of `column`.

    What was not measured yet is left empty.
    """
    columns = list(dict.fromkeys(r[column] for r in rows))
    lines = [
        f"| arm | seed | {' | '.join(map(str, columns))} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for arm, seed in dict.fromkeys((r["arm"], r["seed"]) for r in rows):
        of_arm = [r for r in rows if (r["arm"], r["seed"]) == (arm, seed)]
        found = {r[column]: f"{r[value]:.{digits}f}" for r in of_arm}
        lines.append(f"| {arm} | {seed} | {' | '.join(found.get(c, '') for c in columns)} |")
    return lines


def draw_buckets(axes: Any, rows: Sequence[Row], field: str) -> None:
    """A line per arm (its first seed) over the buckets in `field`, on a logarithmic axis."""
    first: dict[str, Row] = {}
    for r in rows:
        first.setdefault(r["arm"], r)
    for r in first.values():
        shown = [b for b in r[field] if b["tokens"]]
        centres = [max((b["first"] + b["last"]) / 2, 0.5) for b in shown]
        axes.plot(centres, [b["bits_per_byte"] for b in shown], "o-", label=r["arm"])
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
