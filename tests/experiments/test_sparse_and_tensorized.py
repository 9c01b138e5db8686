"""The experiments of 2306.01160 and 2410.20926: arms differ by their attention; coverage is 1."""

import json
from pathlib import Path

import pytest

from longctx.models import MODELS, count_parameters
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
    assert sparse["hash nb=16"].model == MODELS["gpt2-hash"]
    tensorized = load(FOLDER / "tensorized" / "language_model.py").runs("paper")
    assert round(count_parameters(tensorized["dense"].model) / 1e9, 1) == 8.0


def check_outputs(experiment, rows, folder):
    """Rows can be written down, and are drawn."""
    assert json.dumps(list(rows))
    experiment.draw(rows, folder / "figure.png")
    assert (folder / "figure.png").stat().st_size > 1000


def test_sparse_comparison_shows_loss_by_step_and_time(tmp_path):
    """Two seeds of every arm; what is slower or worse than the base reaches its loss later."""
    experiment = load(FOLDER / "sparse_flash" / "language_model.py")
    seconds = {"dense tied": 60.0, "hash nb=4": 30.0, "drop 0.7": 18.0}
    rows = [
        {
            **{"arm": arm, "seed": seed, "scale": "small", "base": "dense tied", "paper": None},
            **{"parameters": 10**6, "tokens": 4000, "epochs": 1.0, "corpus": "x", "device": "none"},
            "tokens_per_second": 4000 / seconds[arm],
            "curve": [[100 * n, 7.0 - n + (arm == "drop 0.7")] for n in (1, 2, 3, 4)],
            "bits_per_byte": 3.0 + (arm == "drop 0.7"),
        }
        for arm in seconds
        for seed in (0, 1)
    ]
    table = experiment.table(rows)
    for line in (
        "| dense tied | 0 | 60.0 | 60.0 |",
        "| hash nb=4 | 1 | 30.0 | 30.0 |",
        "| drop 0.7 | 0 | 18.0 | never |",
    ):
        assert line in table
    check_outputs(experiment, rows, tmp_path)
    untimed = [row | {"tokens_per_second": None} for row in rows]  # interrupted before
    assert "| drop 0.7 | 1.0M | 4.0000 |" in experiment.table(untimed)
    check_outputs(experiment, untimed, tmp_path)


def test_sparse_parts_are_two_seeds_of_every_arm(tmp_path):
    experiment = load(FOLDER / "sparse_flash" / "language_model.py")
    parts = experiment.parts("small", tmp_path)
    assert [part.name for part in parts[:2]] == ["dense tied, seed 0", "dense tied, seed 1"]
    assert len(parts) == 2 * len(experiment.arms) and all(part.timed for part in parts)


def test_runtime_shows_the_papers_ratios(tmp_path):
    experiment = load(FOLDER / "sparse_flash" / "runtime.py")
    ms = {"our dense": (40.0, 160.0), "hash nb=16": (20.0, 40.0), "drop 0.5": (20.0, 50.0)}
    paper = {"our dense": (257, 1004), "hash nb=16": (116, 373), "drop 0.5": (115, 402)}
    rows = [
        {
            "operator": name,
            "length": length,
            "batch": 4,
            "ms": ms[name][i],
            "tiles": 9.0,
            "speedup": ms["our dense"][i] / ms[name][i],
            "paper_ms": paper[name][i],
            "device": "none",
        }
        for i, length in enumerate((16384, 32768))
        for name in ms
    ]
    assert "| 32768 | 4 | hash nb=16 | 40.00 | 4.00 | 9 | 373 | 2.69 |" in experiment.table(rows)
    check_outputs(experiment, rows, tmp_path)


def test_coverage_counts_every_pair(tmp_path):
    experiment = load(FOLDER / "sparse_flash" / "coverage.py")
    rows = experiment.measure("small", tmp_path)
    assert all(row["hash"] == 1.0 for row in rows)
    even, uneven = rows[:3], rows[3:]
    for row, expected in zip(even, (1.00, 0.90, 0.60), strict=True):
        assert abs(row["chunks"] - expected) < 0.05
        assert row["mean_chunks"] > 0.99
    assert all(row["mean_chunks"] < 0.8 for row in uneven)
    assert "| even | 4096 | 1.000 |" in experiment.table(rows)
    check_outputs(experiment, rows, tmp_path)


def test_tiles_of_intervals_are_fewer_than_released(tmp_path):
    experiment = load(FOLDER / "sparse_flash" / "tiles.py")
    rows = experiment.measure("smoke", tmp_path)
    hashed = [r for r in rows if r["operator"].startswith("hash")]
    dropped = [r for r in rows if r["operator"].startswith("drop")]
    assert all(r["intervals"] < r["released"] <= r["dense"] for r in hashed)
    assert all(r["intervals"] == r["released"] < r["dense"] for r in dropped)
    assert "| 512 | drop 0.7 | 10 |" in experiment.table(rows)
    check_outputs(experiment, rows, tmp_path)
