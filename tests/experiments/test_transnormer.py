"""The ablation tables: every arm differs from its base as the paper says; a smoke run works."""

import json
from pathlib import Path

import pytest

from experiments.transnormer import training_speed
from longctx.models import count_parameters
from longctx.reproduce import Ablation, load
from longctx.reproduce.ablation import compare
from longctx.reproduce.command import reproduce

FOLDER = Path(__file__).parents[2] / "experiments" / "transnormer"
OTHERS = ("base", "wikitext103")  # shared settings; perplexities, tested in a file of their own
FILES = sorted(p for p in FOLDER.glob("*.py") if "ablation(" in p.read_text())
FILES = [p for p in FILES if p.stem not in OTHERS]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_arms_differ_from_the_base_and_say_what_the_paper_found(file):
    experiment = load(file)
    assert isinstance(experiment, Ablation)
    for scale in ("smoke", "small", "paper"):
        runs = experiment.runs(scale)
        base = runs.pop(experiment.base)
        assert base == experiment.scales[scale]
        for name, run in runs.items():
            assert run.model != base.model, name
            assert (run.data, run.optim, run.train) == (base.data, base.optim, base.train), name
    assert all(arm.paper is not None for arm in experiment.arms.values())


# Parameters in millions that the paper prints, or that follow from its description.
@pytest.mark.parametrize(
    ("file", "arm", "millions"),
    [
        ("gating", "with gate", 385),
        ("gating", "without gate", 379),
        ("positional_encoding", "APE", 386),
        ("transformer_1b", "TNL", 992),
    ],
)
def test_parameter_counts_at_paper_scale(file, arm, millions):
    experiment = load(FOLDER / f"{file}.py")
    assert round(count_parameters(experiment.runs("paper")[arm].model) / 1e6) == millions


def test_smoke_run_writes_rows_table_and_figure(tmp_path, capsys):
    reproduce([str(FOLDER / "gating.py"), "--scale", "smoke", "--out", str(tmp_path)])
    folder = tmp_path / "transnormer" / "gating" / "smoke"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["with gate", "without gate"]
    assert all(0 < row["bits_per_byte"] < 12 for row in rows)
    assert rows[0]["bits_per_byte"] != rows[1]["bits_per_byte"]
    assert {"command", "commit", "device", "versions", "date"} <= rows[0].keys()
    assert rows[0]["corpus"] == "python-stdlib" and len(rows[0]["corpus_sha256"]) == 16
    assert len({row["corpus_sha256"] for row in rows}) == 1
    assert 0 < rows[0]["epochs"] < 1e-3  # 256 of some ten million bytes
    assert "2.263" in capsys.readouterr().out
    assert (folder / "figure.png").stat().st_size > 1000
    before = (tmp_path / "runs").stat().st_mtime_ns
    reproduce([str(FOLDER / "gating.py"), "--scale", "smoke", "--out", str(tmp_path)])
    assert (tmp_path / "runs").stat().st_mtime_ns == before, "finished runs were trained again"


def test_differences_and_their_standard_errors():
    def row(arm, score, paper):
        return {"arm": arm, "base": "a", "bits_per_byte": score, "paper": paper, "parameters": 1}

    rows = [row("a", s, 1.0) for s in (2.0, 2.1, 2.2)]
    rows += [row("b", 2.2, 1.5), row("c", 3.0, None)]
    base, b, c = compare(rows)
    assert base.verdict == "base"
    assert b.difference == pytest.approx(0.1)
    assert b.stderr == pytest.approx(0.1 * (1 / 3 + 1) ** 0.5)
    assert b.paper_difference == pytest.approx(0.5)
    assert b.verdict.startswith("not resolved at this scale")
    assert c.paper_difference is None
    assert c.verdict.startswith("+0.9")


def test_the_spread_between_seeds_is_pooled():
    def row(arm, score):
        return {"arm": arm, "base": "a", "bits_per_byte": score, "paper": None, "parameters": 1}

    rows = [row("a", s) for s in (2.0, 2.2)] + [row("b", s) for s in (2.0, 2.4, 2.2)]
    _, b = compare(rows)
    pooled = ((0.02 + 0.08) / (1 + 2)) ** 0.5
    assert b.stderr == pytest.approx(pooled * (1 / 2 + 1 / 3) ** 0.5)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        load(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="must define EXPERIMENT"):
        load(tmp_path / "empty.py")


def test_training_speed_keeps_what_was_measured_when_a_length_fails(tmp_path):
    base = {"parameters": 1e6, "tokens": 4096, "device": "a chip", "paper": None}
    measured = {"tokens_per_second": 100.0, "mfu": 0.25}
    rows = [
        {"model": model, "length": length, **base, **measured}
        for model in ("TNL", "Transformer")
        for length in (1024, 4096)
    ]
    rows[1]["tokens_per_second"] = 98.0
    del rows[3]["tokens_per_second"], rows[3]["mfu"]
    rows[3]["failed"] = "out of memory"
    table = training_speed.EXPERIMENT.table(rows)
    assert "TNL: 0.980 of its fastest length" in table
    assert "| 4096 | 98 | 25% | failed |" in table
    training_speed.EXPERIMENT.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
