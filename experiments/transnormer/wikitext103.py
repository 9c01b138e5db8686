"""WikiText-103 with 45M parameters: perplexity of TNL and of the softmax Transformer.

Claim (2405.17381, table 1): perplexity on validation and test 23.46 and 24.03 for TNL (45.45M
parameters), 24.40 and 24.78 for the Transformer (44.65M).
Command: longctx reproduce experiments/transnormer/wikitext103.py --scale paper
Expected: TNL below the Transformer by about 0.9 and 0.8. 50,000 updates of 65,536 tokens.

The settings are those of the first author's script for this benchmark: GPT-2's tokens, 128
sequences of 512, Adam (0.9, 0.98), 5e-4 after 4000 steps of warm-up, then the inverse square root,
weight decay 0.2. Ours: no dropout (there 0.1), heads of 64, articles do not see one another, GELU
and RoPE in the Transformer. Perplexity is per published token, whatever ours are:
exp(nats of the split / its GPT-2 tokens and line ends).

The data, into the folder data/ (the loader checks the archive's SHA-256 sum at every start):

    curl -L --create-dirs -o data/wikitext-103-raw-v1.zip \\
        https://wikitext.smerity.com/wikitext-103-raw-v1.zip

and GPT-2's tokenizer.json (openai-community/gpt2 on the Hugging Face hub) as data/gpt2.json. Then
`python -m experiments.transnormer.wikitext103` counts words and tokens against the published ones.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.transnormer.base import SMOKE as TINY
from experiments.transnormer.base import ablation
from longctx.data.config import DataConfig, DataError
from longctx.data.packing import pack
from longctx.data.sources import documents
from longctx.data.tokenizer import load_tokenizer
from longctx.eval.score import make_scorer
from longctx.models import MlpConfig, SoftmaxConfig, tnl
from longctx.parallel.mesh import make_mesh
from longctx.reproduce import Ablation, Arm, Part, Row
from longctx.train.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
from longctx.train.restore import load_run

ARCHIVE = "data/wikitext-103-raw-v1.zip"
PAPER_PERPLEXITY = {
    "TNL": {"valid": 23.46, "test": 24.03},
    "Transformer": {"valid": 24.40, "test": 24.78},
}
# Words and line ends (1609.07843, table 1), lines, and GPT-2 tokens of the lines as others count.
WORDS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
LINES = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
GPT2_TOKENS = {"train": 117_920_140, "valid": 247_289, "test": 283_287}

PAPER = RunConfig(
    model=dataclasses.replace(tnl(512, 6, 1280, head_dim=64), vocab_size=50257),
    data=DataConfig(
        source=f"wikitext-103-raw:{ARCHIVE}",
        tokenizer="data/gpt2.json",
        sequence_length=512,
        batch_size=128,
    ),
    optim=OptimConfig(
        learning_rate=5e-4,
        decay="inverse_sqrt",
        warmup_steps=4000,
        beta2=0.98,
        weight_decay=0.2,
    ),
    train=TrainConfig(steps=50_000, log_every=100, checkpoint_every=1000),
    eval=EvalConfig(every=1000, tokens=1 << 18),
)
SMALL = dataclasses.replace(PAPER, train=dataclasses.replace(PAPER.train, steps=5000))


def transformer(run: RunConfig) -> RunConfig:
    """The baseline: its 44.65M parameters are six layers of fairseq's 512 x 2048."""
    width, heads = run.model.width, run.model.lightning.num_heads
    softmax = SoftmaxConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads)
    mlp = MlpConfig(kind="mlp", width=4 * width, activation="gelu")
    model = dataclasses.replace(
        run.model, mixers=("softmax",), softmax=softmax, mlp=mlp, norm="layer"
    )
    return dataclasses.replace(run, model=model)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The arms of an ablation, each scored on the whole validation and test parts."""

    ablation: Ablation

    def runs(self, scale: str) -> dict[str, RunConfig]:
        """The run of each arm."""
        return self.ablation.runs(scale)

    def parts(self, scale: str, runs: Path) -> list[Part]:
        """Check the data; a part per arm, scored on both parts of it."""
        if scale != "smoke":
            check(self.ablation.scales[scale].data)

        def rows(row: Row, config: RunConfig, run: Path) -> list[Row]:
            del config  # the run has it too
            return [{**row, **perplexities(run)}]

        return [part.then(rows) for part in self.ablation.parts(scale, runs)]

    def table(self, rows: Sequence[Row]) -> str:
        """Perplexity beside the paper's; that of a smoke run is per byte of other text."""
        lines = [
            f"# {self.ablation.title} ({self.ablation.source})",
            "",
            f"{rows[0]['scale']} scale, {rows[0]['tokens']:,} tokens a run, {rows[0]['device']}.",
            "",
            "| model | seed | parameters | validation | paper | test | paper |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            cells = [r["arm"], str(r["seed"]), f"{r['parameters'] / 1e6:.2f}M"]
            for part, paper in PAPER_PERPLEXITY[r["arm"]].items():
                cells += [f"{r[f'{part}_perplexity']:.2f}", f"{paper:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Ours over the paper's."""
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(ylabel="perplexity", title=self.ablation.title)
        for part, marker in (("valid", "o"), ("test", "s")):
            names = [r["arm"] for r in rows]
            ours = [r[f"{part}_perplexity"] for r in rows]
            axes.plot(names, ours, marker, label=f"{part}, ours ({rows[0]['scale']} scale)")
            paper = [PAPER_PERPLEXITY[name][part] for name in names]
            axes.plot(names, paper, marker, mfc="none", label=f"{part}, paper")
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def perplexities(run: Path) -> dict[str, float]:
    """Perplexity per published token on the validation and test parts of WikiText-103.

    Of a run on other text: per token of its own, on its held-out text, twice.
    """
    mesh, scores = make_mesh(), {}
    with jax.set_mesh(mesh):
        loaded = load_run(run, mesh)
        data = loaded.config.data
        name, _, place = data.source.partition(":")
        for part in ("valid", "test"):
            chosen = dataclasses.replace(data, valid_source=f"{name}/{part}:{place}")
            texts = documents(chosen if place else data, "valid")
            corpus = pack(texts, load_tokenizer(data.tokenizer))
            scorer = make_scorer(
                loaded.graph, corpus, data.sequence_length, tokens=len(corpus.tokens), mesh=mesh
            )
            score = scorer(loaded.params, loaded.rest)
            tokens = GPT2_TOKENS[part] + LINES[part] if place else len(corpus.tokens)
            bits = score.bits_per_byte * corpus.text_bytes
            scores[f"{part}_perplexity"] = math.exp(bits * math.log(2) / tokens)
    return scores


def words_and_lines(texts: Sequence[bytes]) -> tuple[int, int]:
    """How the corpus is counted: its words and line ends together, and its lines."""
    lines = sum(text.count(b"\n") for text in texts)
    return sum(len(text.split()) for text in texts) + lines, lines


def check(data: DataConfig, parts: Sequence[str] = ("valid", "test")) -> None:
    """Count words, lines and tokens of WikiText-103 against the published numbers.

    Raises:
      DataError: they differ: in words or lines at all, in tokens (line ends may be other tokens
        here than there) by more than one in fifty.
    """
    name, _, place = data.source.partition(":")
    tokenizer = load_tokenizer(data.tokenizer)
    for part in parts:
        chosen = dataclasses.replace(data, valid_source=f"{name}/{part}:{place}")
        texts = [text for _, text in documents(chosen, "valid")]
        counted, wanted = words_and_lines(texts), (WORDS[part], LINES[part])
        if counted != wanted:
            raise DataError(f"{place}, {part}: words and lines are {counted}, published {wanted}")
        tokens, published = sum(len(tokenizer.encode(t)) for t in texts), GPT2_TOKENS[part]
        print(f"{part}: {counted[0]:,} words, {tokens:,} tokens; published: {published:,}")
        if abs(tokens / (published + LINES[part]) - 1) > 0.02:
            raise DataError(f"{data.tokenizer} is not GPT-2's: {tokens:,} tokens in {part}")


EXPERIMENT = Perplexity(
    dataclasses.replace(
        ablation(
            "WikiText-103",
            "table 1",
            base="Transformer",
            arms={"TNL": Arm(), "Transformer": Arm(change=transformer)},
        ),
        scales={"paper": PAPER, "small": SMALL, "smoke": TINY},
        seeds={"paper": 1, "small": 1, "smoke": 1},
    )
)
RUNS, SMOKE = EXPERIMENT.runs("paper"), EXPERIMENT.runs("smoke")

if __name__ == "__main__":
    check(PAPER.data, ("train", "valid", "test"))
