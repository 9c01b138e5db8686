"""Longest context that trains on a pod, by method: an analysis of compiled steps, not a run.

Claim (2310.01889, table 3, 7B): in thousands of tokens vanilla, memory-efficient, blockwise and
ring attention reach 2, 8, 16 and 2048 on TPUv5e-256. (32 GPUs are in max_context_gpu.py.)
Command: longctx reproduce experiments/ring_attention/max_context.py --scale paper
Expected: the ring's context grows with the devices along `seq`, the others' does not; every method
before it gains on the one before.

The training step is compiled ahead of time, and the compiler says what memory it needs; context
doubles until that is more than a device has. As in the paper: data-parallel shards of parameters
and optimizer, whole layers recomputed, no tensor parallelism, every sequence on as few devices as
the method allows; the ring has blockwise feed-forward layers too, and takes one head after another.
Ours: AdamW in float32 with
bfloat16 products. In the paper parameters and sequences are split over the same devices; here for
the ring parameters are over 16 and each sequence over the others, hence over fewer.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.transnormer.base import SMOKE as TINY
from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.models import MODELS, ModelConfig, transformer
from longctx.models.config import ParallelConfig
from longctx.nn import attention
from longctx.parallel.mesh import MeshConfig
from longctx.plan import report_of
from longctx.reproduce import Row
from longctx.train.config import RunConfig

METHODS = ("vanilla", "memory-efficient", "blockwise", "ring")
# Thousands of tokens of the paper's 7B models (table 3).
PAPER = {
    "v5e:16x16": {"vanilla": 2, "memory-efficient": 8, "blockwise": 16, "ring": 2048},
    "h100:32": {"vanilla": 4, "memory-efficient": 64, "blockwise": 128, "ring": 4096},
}
MLP_CHUNK = 1024  # tokens, in blockwise feed-forward layers


@dataclasses.dataclass(frozen=True)
class Pod:
    """A topology, its mesh for the ring, and the contexts from which the searches start."""

    topology: str
    fsdp: int
    seq: int
    model: ModelConfig
    first: dict[str, int]

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.fsdp * self.seq


SEVEN = dataclasses.replace(transformer(MODELS["tnl-7b"]), vocab_size=32000, remat="block")
TINY_MODEL = dataclasses.replace(transformer(TINY.model), remat="block")
V5E = Pod("v5e:16x16", 16, 16, SEVEN, dict(zip(METHODS, (8192, 16384, 32768, 262144), strict=True)))
V5P = Pod(
    "v5p:4x4x4", 16, 4, SEVEN, dict(zip(METHODS, (16384, 131072, 262144, 524288), strict=True))
)
PODS = {
    "smoke": [Pod("v5e:2x2", 1, 4, TINY_MODEL, dict.fromkeys(METHODS, 256))],
    "small": [V5E],
    "paper": [V5E, V5P],
}
DOUBLINGS = {"smoke": 0, "small": 4, "paper": 4}


def run(pod: Pod, method: str, length: int) -> RunConfig:
    """A training step whose sequences of `length` tokens fill the pod once."""
    ring = method == "ring"
    chunk = MLP_CHUNK if method in ("blockwise", "ring") else 0
    model = dataclasses.replace(pod.model, mlp=dataclasses.replace(pod.model.mlp, chunk=chunk))
    one_by_one = ParallelConfig("ring", layout="zigzag", head_groups=model.softmax.num_kv_heads)
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=length, batch_size=pod.fsdp if ring else pod.devices),
        mesh=MeshConfig(fsdp=pod.fsdp, seq=pod.seq) if ring else MeshConfig(fsdp=pod.devices),
        parallel=one_by_one if ring else ParallelConfig(),
    )


def quadratic(
    q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], **_: Any
) -> Float[Array, "B T H D"]:
    """Causal attention that holds all scores, as everybody wrote it once."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@contextlib.contextmanager
def attention_of(method: str) -> Iterator[None]:
    """Modules attend by `method` meanwhile: only "vanilla" is not the model's own choice."""
    if method != "vanilla":
        yield
        return
    with mock.patch.object(attention, "context_attention", quadratic):
        yield


@dataclasses.dataclass(frozen=True)
class MaxContext:
    """The longest context per method and pod, with everything that was compiled on the way."""

    pods: Mapping[str, Sequence[Pod]]

    def measure(self, scale: str, runs: Path) -> Iterator[Row]:
        """Double the context until it does not fit, or halve it until it does."""
        del runs  # nothing is trained
        for pod in self.pods[scale]:
            for method in METHODS:
                yield from _search(pod, method, DOUBLINGS[scale])

    def table(self, rows: Sequence[Row]) -> str:
        """A row per pod and method."""
        lines = [
            "# Longest context, by compiled memory (analysis: nothing was run)",
            "",
            "| devices | method | devices of a sequence | tokens | GB a device | paper, tokens |",
            "|---|---|---|---|---|---|",
        ]
        for r in longest(rows):
            paper = PAPER.get(r["topology"], {}).get(r["method"])
            told = f"{paper}K" if paper else ""
            size = f"{r['bytes'] / 1e9:.1f} of {r['available'] / 1e9:.0f}"
            cells = [r["topology"], r["method"], str(r["seq"]), f"{r['length']:,}", size, told]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """A bar per method and pod."""
        from matplotlib.figure import Figure  # slow to import

        found = longest(rows)
        figure = Figure(figsize=(8, 1.5 + 0.4 * len(found)), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens (analysis)", xscale="log")
        names = [f"{r['topology']}, {r['method']}" for r in found]
        axes.barh(names, [r["length"] for r in found])
        axes.invert_yaxis()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def longest(rows: Sequence[Row]) -> list[Row]:
    """Per pod and method the row of the longest context that fits."""
    best: dict[tuple[str, str], Row] = {}
    for r in rows:
        key = (r["topology"], r["method"])
        if r["fits"] and r["length"] >= best.get(key, r)["length"]:
            best[key] = r
    return list(best.values())


def _search(pod: Pod, method: str, doublings: int) -> Iterator[Row]:
    length, direction = pod.first[method], 0
    for _ in range(1 + doublings):
        row = _compiled(pod, method, length)
        yield row
        wanted = 1 if row["fits"] else -1
        if direction and wanted != direction:
            return
        direction = wanted
        length = length * 2 if row["fits"] else length // 2


def _compiled(pod: Pod, method: str, length: int) -> Row:
    config = run(pod, method, length)
    row = {"topology": pod.topology, "method": method, "length": length, "seq": config.mesh.seq}
    try:
        with attention_of(method):
            report = report_of(config, pod.topology)
    except UserError as error:  # the compiler gives up when memory is far from enough
        if "memory" not in str(error):
            raise
        return row | {"fits": False, "bytes": None, "available": None, "refusal": str(error)}
    memory = report["bytes_per_device"]
    return row | {
        "fits": report["fits"],
        "bytes": memory["all"],
        "available": memory["available"],
        "parameters": report["parameters"],
        "device_kind": report["device_kind"],
    }


EXPERIMENT = MaxContext(PODS)
