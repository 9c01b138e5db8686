"""The experiments of 2306.01160 and 2410.20926: arms differ by their attention; coverage is 1."""

from pathlib import Path

import pytest

from longctx.models import count_parameters
from longctx.reproduce import load

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("paper", ["sparse_flash", "tensorized"])
@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_arms_differ_by_their_attention_alone(paper, scale):
    runs = load(FOLDER / paper / "language_model.py").runs(scale)
    base, *others = runs.values()
    assert len({str(run.model) for run in runs.values()}) == len(runs)
    for run in others:
        assert (run.data, run.optim, run.train) == (base.data, base.optim, base.train)
        same = ("width", "num_layers", "mlp", "vocab_size", "learned_positions", "norm")
        for field in same:
            assert getattr(run.model, field) == getattr(base.model, field), field


def test_models_have_the_papers_sizes():
    sparse = load(FOLDER / "sparse_flash" / "language_model.py").runs("paper")
    # About 122M at 8192 positions with a key projection; tied models lack 12 x 768 x 768.
    assert round(count_parameters(sparse["dense untied"].model) / 1e6) == 130
    assert round(count_parameters(sparse["hash nb=16"].model) / 1e6) == 123
    tensorized = load(FOLDER / "tensorized" / "language_model.py").runs("paper")
    assert round(count_parameters(tensorized["dense"].model) / 1e9, 1) == 8.0


def test_coverage_counts_every_pair(tmp_path):
    experiment = load(FOLDER / "sparse_flash" / "coverage.py")
    rows = experiment.measure("small", tmp_path)
    assert all(row["hash"] == 1.0 for row in rows)
    for row, expected in zip(rows, (1.00, 0.90, 0.60), strict=True):
        assert abs(row["chunks"] - expected) < 0.05
    assert "| 4096 | 1.000 |" in experiment.table(rows)
    experiment.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
