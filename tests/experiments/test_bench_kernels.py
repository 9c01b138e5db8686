"""The kernel benchmarks measure all that they judge, and name what is absent."""

import sys

import pytest

from experiments.bench import _flash_report as flash_report
from experiments.bench import _lightning_report as lightning_report
from experiments.bench import flash, lightning
from experiments.bench._claims import Claim, claims_table
from longctx.provenance import read_rows

TIMES = {"forward_ms": 1.0, "both_ms": 4.0, "forward_tflops": 500.0, "backward_tflops": 300.0}


def flash_rows(**ours):
    """A row for everything that a GPU would measure; `ours` changes ours."""
    rows = []
    for group, shapes in flash.groups_for("gpu").items():
        for shape in shapes:
            for name in flash.PEERS.get(group, flash.RIVALS):
                found = {"errors": dict.fromkeys(flash.NAMES, 1e-3)} if group == "errors" else TIMES
                found = found | (ours if name == "ours" and group != "errors" else {})
                rows.append({**shape._asdict(), "group": group, "implementation": name, **found})
    return rows


def lightning_rows():
    rows = []
    for group, shapes in lightning.groups_for("gpu").items():
        for shape in shapes:
            for name in lightning.IMPLEMENTATIONS:
                row = {**shape._asdict(), "dtype": "bfloat16", "group": group}
                row |= {"implementation": name, **TIMES}
                row |= {"forward_ns_per_token": 5.0, "both_ns_per_token": 20.0}
                row |= {"forward_of_floor": 0.9, "errors": dict.fromkeys(lightning.NAMES, 1e-3)}
                rows.append(row)
    return rows


def test_everything_judged_is_measured():
    for claims in (flash_report.claims(flash_rows()), lightning_report.claims(lightning_rows())):
        found = list(claims)
        assert len(found) > 10
        assert [claim.what for claim in found if claim.verdict == "not measured"] == []


def test_verdicts():
    slow = {c.what: c.verdict for c in flash_report.claims(flash_rows(forward_ms=1.04))}
    assert slow["forward over the best of cudnn and tokamax, D 64, 4 x 8192"] == "MISSED"
    assert slow["forward + backward over cuDNN, D 64, 4 x 8192"] == "met"
    fast = {c.what: c.verdict for c in flash_report.claims(flash_rows(backward_tflops=460.0))}
    assert [v for w, v in fast.items() if w.startswith("D 256 backward")] == ["met"]
    assert [v for w, v in slow.items() if w.startswith("D 256 backward")] == ["MISSED"]
    table = claims_table([Claim("x", None, 1.5), Claim("y", 2.0, 1.5, at_least=True)])
    assert "| x |  | at most 1.5 | not measured |" in table
    assert "| y | 2 | at least 1.5 | met |" in table


def test_a_table_and_a_plot_of_rows_with_gaps(tmp_path):
    rows = flash_rows()
    rows[2] = {k: v for k, v in rows[2].items() if k not in TIMES} | {"absent": "no such module"}
    assert "absent: no such module" in flash_report.table(rows)
    flash_report.plot(rows, tmp_path / "flash.jsonl")
    lightning_report.plot(lightning_rows(), tmp_path / "lightning.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"flash.png", "lightning.png"}


@pytest.mark.slow
def test_flash_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--groups", "dense", "errors", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    flash.main()
    rows = read_rows(out)
    assert {r["implementation"] for r in rows} == set(flash.ALL)
    by_name = {r["implementation"]: r for r in rows if r["group"] == "dense"}
    assert by_name["ours"]["both_ms"] > 0 and by_name["ours"]["temporary_bytes"] > 0
    assert "tokamax" in by_name["tokamax"]["absent"]
    (errors,) = (r["errors"] for r in rows if "errors" in r)
    assert all(0 < e < 5e-3 for e in errors.values())
    assert "absent: " in capsys.readouterr().out and (tmp_path / "rows.png").exists()
