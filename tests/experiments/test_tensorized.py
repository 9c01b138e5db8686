"""The experiments of 2410.20926: scores by place, tables and figures, smoke runs, prefill."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import prefill, tensorized
from experiments.tensorized.base import by_length, by_place
from longctx.data.pipeline import load_corpus, stack
from longctx.eval.nll import MODEL_FIELDS, token_nll
from longctx.provenance import read_rows
from longctx.reproduce import load, reproduce
from longctx.train.loop import train
from longctx.train.restore import load_run

FOLDER = Path(__file__).parents[2] / "experiments" / "tensorized"
NAMES = ("language_model", "long_range", "adaptation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps: the mixed-radix arm at smoke scale."""
    out = tmp_path_factory.mktemp("tensorized") / "run"
    train(load(FOLDER / "language_model.py").runs("smoke")["mixed radix"], out)
    return out


def test_scores_by_length_and_place(trained):
    """Each bucket's mean, against the losses of the model taken apart by hand."""
    (row,) = by_length({"arm": "x"}, trained, [64], trained=64, tokens=128)
    assert (row["arm"], row["trained"], row["length"], row["tokens"]) == ("x", 64, 64, 128)
    places = by_place(trained, 8, tokens=128)
    assert [(p["first"], p["last"]) for p in places] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    loaded = load_run(trained)
    corpus = load_corpus(loaded.config.data, "valid", vocab_size=loaded.config.model.vocab_size)
    windows = corpus.windows(64)
    batch = stack([windows[0], windows[len(windows) - 1]])
    nll = token_nll(loaded.model, {f: batch[f] for f in MODEL_FIELDS})
    bits = np.asarray(nll) / np.log(2) / corpus.bytes_per_token
    for p in places:
        chosen = [t for t in range(8, 64) if p["first"] <= t % 8 <= p["last"]]
        assert p["tokens"] == 2 * len(chosen)
        np.testing.assert_allclose(p["bits_per_byte"], bits[:, chosen].mean(), rtol=1e-5)


def rows_of(name):
    """Rows as the parts make them, with numbers that can be told apart."""
    shared = {"seed": 0, "scale": "smoke", "device": "cpu", "trained": 64}
    if name == "long_range":
        return [
            {**shared, "arm": arm, "task": task, "length": 64, "accuracy": right, "chance": 0.01}
            for arm, right in (("window", 0.125), ("mixed radix", 0.5))
            for task in ("mqar", "induction")
        ]
    buckets = [
        {"first": f, "last": 2 * f, "tokens": 9, "bits_per_byte": 2.0 + f} for f in (0, 1, 2)
    ]
    scored = {"buckets": buckets, "places": buckets}
    return [
        {**shared, **scored, "arm": arm, "length": n, "bits_per_byte": bits + n / 1000}
        for arm, bits in (("dense", 2.0), ("mixed radix", 1.5))
        for n in (64, 128, 256, 512)
    ]


@pytest.mark.parametrize(
    "name, cells",
    [
        ("language_model", ["| mixed radix | 0 | 1.5640 |", "| dense | 0 | 2.0000 | 3.5000 |"]),
        ("adaptation", ["| mixed radix | 0 | 1.5640 | 1.6280 |", "adapted at 32768"]),
        ("long_range", ["| mixed radix | 0 | 0.500 | 0.500 |", "| (chance) | | 0.010 | 0.010 |"]),
    ],
)  # fmt: skip
def test_tables_and_figures(name, cells, tmp_path):
    experiment, rows = load(FOLDER / f"{name}.py"), rows_of(name)
    table = experiment.table(rows)
    assert all(cell in table for cell in cells), table
    experiment.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_adapted_arms_go_on_from_the_pretrained_run():
    experiment = load(FOLDER / "adaptation.py")
    before, arms = (
        experiment.pretrained["small"],
        experiment.ablation("small", "there").runs("small"),
    )
    assert {run.train.init for run in arms.values()} == {"there"}
    assert {run.data.sequence_length for run in arms.values()} == {4096}
    assert arms["mixed radix 2048"].model.tensorized.dims == (2048, None)
    assert arms["window 256"].model.softmax.window == 256
    same = dataclasses.replace(before.model, mixers=("tensorized",))
    assert arms["mixed radix 2048"].model == same


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_runs(name, tmp_path):
    (folder,) = reproduce([FOLDER / f"{name}.py"], "smoke", tmp_path)
    rows = read_rows(folder / "results.jsonl")
    scores = [r["accuracy"] if name == "long_range" else r["bits_per_byte"] for r in rows]
    assert np.isfinite(scores).all() and (folder / "figure.png").stat().st_size > 5000
    lengths = {r["length"] for r in rows}
    assert len(lengths) == (1 if name == "long_range" else 4)


def test_prefill_benchmark(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    given = f"prefill --model transformer-tiny --layers 1 --length 64 --dims 8 8 --out {out}"
    monkeypatch.setattr(sys, "argv", given.split())
    prefill.main()
    rows = read_rows(out)
    assert [(r["operator"], r["layers"]) for r in rows] == [("dense", 1), ("mixed radix", 1)]
    assert (
        all(r["forward_ms"] > 0 for r in rows) and "dense / mixed radix" in capsys.readouterr().out
    )


def test_speed_of_the_operator_is_written(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    given = f"tensorized --dims 8 4 --heads 2 --kv-heads 1 --width 16 --out {out}"
    monkeypatch.setattr(sys, "argv", given.split())
    tensorized.main()
    first, plain = read_rows(out)
    assert first["operator"] == "mixed radix, bias and RoPE"
    assert (plain["operator"], plain["length"]) == ("mixed radix, plain", 32)
    for name in ("forward", "forward_backward"):
        assert first[f"speedup_{name}"] == 1
        ratio = first[f"{name}_ms"] / plain[f"{name}_ms"]
        np.testing.assert_allclose(plain[f"speedup_{name}"], ratio)
