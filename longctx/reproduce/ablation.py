"""Ablations: the arms of one base run, trained at a scale, their differences beside the paper's."""

import dataclasses
import functools
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.data.config import DataConfig
from longctx.data.episodes import PREFIX
from longctx.data.packing import Corpus
from longctx.data.pipeline import load_corpus
from longctx.figures import tidy
from longctx.models import count_parameters
from longctx.reproduce.part import Part, Row, held_out
from longctx.train.config import RunConfig

SCALES = ("smoke", "small", "paper")


def _same(run: RunConfig) -> RunConfig:
    return run


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a table: what it changes in the base run, and what the paper measured."""

    paper: float | None = None
    change: Callable[[RunConfig], RunConfig] = _same


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A table of arms, each the base run with one change.

    Attributes:
      title: what is compared.
      source: where the paper says so: arXiv number and table.
      paper_unit: of the arms' `paper` numbers.
      base: the arm to which the others are compared.
      arms: by name, in the order of the table.
      scales: the base run at each scale.
      seeds: how many seeds the base arm has at each scale.
      arm_seeds: how many every other arm has, if not one.
    """

    title: str
    source: str
    paper_unit: str
    base: str
    arms: Mapping[str, Arm]
    scales: Mapping[str, RunConfig]
    seeds: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"smoke": 1, "small": 3, "paper": 1}
    )
    arm_seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base not in self.arms:
            raise ValueError(f"base={self.base!r} must be one of {sorted(self.arms)}")
        if set(self.scales) != set(SCALES):
            raise ValueError(f"scales={sorted(self.scales)} must be {sorted(SCALES)}")

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each arm, with the first seed."""
        if scale not in SCALES:
            raise ValueError(f"{scale=} must be one of {', '.join(SCALES)}")
        return {name: arm.change(self.scales[scale]) for name, arm in self.arms.items()}

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """A part per arm and seed: its held-out scores."""
        del runs  # no arm begins with another's parameters
        return [
            Part(
                f"{name}, seed {seeded.train.seed}",
                seeded,
                functools.partial(self._rows, name, scale, seeded),
            )
            for name, config in self.runs(scale).items()
            for seeded in _with_seeds(config, self._count(name, scale))
        ]

    def _count(self, name: str, scale: str) -> int:
        return self.seeds[scale] if name == self.base else self.arm_seeds.get(scale, 1)

    def _rows(self, name: str, scale: str, config: RunConfig, run: Path) -> Iterator[Row]:
        yield {
            "title": self.title,
            "source": self.source,
            "base": self.base,
            "scale": scale,
            "arm": name,
            "seed": config.train.seed,
            "parameters": count_parameters(config.model),
            "tokens": config.tokens_per_step * config.train.steps,
            "unit": "bits per byte",
            "paper": self.arms[name].paper,
            "paper_unit": self.paper_unit,
            **_data(config),
            **held_out(run),
        }

    def table(self, rows: Sequence[Row]) -> str:
        """Differences from the base arm with their standard errors, in Markdown."""
        lines = [
            f"# {self.title} ({self.source})",
            "",
            f"Ours in bits per byte ({rows[0]['scale']} scale, {rows[0]['tokens']:,} tokens a run: "
            f"{rows[0]['epochs']:.2f} epochs of {rows[0]['corpus']}; {rows[0]['device']}), the "
            f"paper's in {self.paper_unit}.",
            "A difference below two standard errors is not resolved at this scale; where nothing",
            "was run with several seeds there is no standard error.",
            "",
            "| arm | parameters | ours | difference from base | paper | paper's difference |",
            "|---|---|---|---|---|---|",
        ]
        for result in compare(rows):
            lines.append(
                f"| {result.arm} | {result.parameters / 1e6:.1f}M | {result.mean:.4f} | "
                f"{result.verdict} | {_number(result.paper)} | {_number(result.paper_difference)} |"
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Our differences, with two standard errors, over the paper's."""
        from matplotlib.figure import Figure  # slow to import

        results = compare(rows)
        figure = Figure(figsize=(7, 1.8 + 0.4 * len(results)), layout="constrained")
        axes = figure.add_subplot(title=f"{self.title} ({self.source})")
        places = range(len(results))
        axes.errorbar(
            [r.difference for r in results],
            places,
            xerr=[2 * (r.stderr or 0.0) for r in results],
            fmt="o",
            label=f"ours, bits per byte, {rows[0]['scale']} scale (2 standard errors)",
        )
        known = [(r.paper_difference, y) for r, y in zip(results, places, strict=True)]
        known = [(x, y) for x, y in known if x is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", mfc="none", label=f"paper, {self.paper_unit}")
        tidy(axes)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_yticks(list(places), [r.arm for r in results])
        axes.invert_yaxis()
        axes.set_xlabel(f"difference from {self.base!r} (to the right is worse)")
        figure.legend(loc="outside lower center", fontsize="small", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


@dataclasses.dataclass(frozen=True)
class Result:
    """One arm beside the base arm."""

    arm: str
    parameters: int
    mean: float
    difference: float
    stderr: float | None
    paper: float | None
    paper_difference: float | None
    is_base: bool

    @property
    def verdict(self) -> str:
        """The difference with its standard error, if it stands out from it."""
        if self.is_base:
            return "base"
        if self.stderr is None:
            return f"{self.difference:+.4f}"
        text = f"{self.difference:+.4f} ± {self.stderr:.4f}"
        resolved = abs(self.difference) >= 2 * self.stderr
        return text if resolved else f"not resolved at this scale ({text})"


def compare(rows: Sequence[Row]) -> list[Result]:
    """Every arm against the base arm.

    The spread sd between seeds is pooled over the arms that have several, and sd sqrt(1/n + 1/m)
    is the standard error of the difference between arms of n and of m runs.
    """
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["arm"], []).append(row["bits_per_byte"])
    first = {row["arm"]: row for row in reversed(rows)}
    base = rows[0]["base"]
    n, spread = len(scores[base]), _spread(scores.values())
    results = []
    for arm, values in scores.items():
        paper, paper_base = first[arm]["paper"], first[base]["paper"]
        known = paper is not None and paper_base is not None
        results.append(
            Result(
                arm=arm,
                parameters=first[arm]["parameters"],
                mean=statistics.mean(values),
                difference=statistics.mean(values) - statistics.mean(scores[base]),
                stderr=None if spread is None else spread * math.sqrt(1 / n + 1 / len(values)),
                paper=paper,
                paper_difference=paper - paper_base if known else None,
                is_base=arm == base,
            )
        )
    return results


def _spread(scores: Iterable[Sequence[float]]) -> float | None:
    """Pooled standard deviation of groups around their own means; None if all have one member."""
    groups = [group for group in scores if len(group) > 1]
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else None


def _with_seeds(config: RunConfig, count: int) -> list[RunConfig]:
    """`config` with its seed and the ones that follow."""
    seeds = range(config.train.seed, config.train.seed + count)
    return [
        dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        for seed in seeds
    ]


def _data(config: RunConfig) -> dict[str, Any]:
    """What a run reads, so that rows with another corpus are told apart."""
    if config.data.source.startswith(PREFIX):  # as many episodes as it takes
        return {"corpus": config.data.source}
    digest, size = _corpus(config.data, config.model.vocab_size)
    tokens = config.tokens_per_step * config.train.steps
    return {"corpus": config.data.source, "corpus_sha256": digest, "epochs": tokens / size}


@functools.cache
def _corpus(data: DataConfig, vocab_size: int) -> tuple[str, int]:
    """Checksum and number of the training tokens."""
    corpus = load_corpus(data, "train", vocab_size=vocab_size)
    assert isinstance(corpus, Corpus), "episodes have no checksum"
    return hashlib.sha256(corpus.tokens.tobytes()).hexdigest()[:16], len(corpus.tokens)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
