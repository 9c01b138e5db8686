"""The ring benchmark runs every program it would time, and its rows say what they must."""

import sys

import jax
import pytest

from experiments.bench import ring
from longctx.provenance import read_rows


@pytest.mark.slow
def test_rows_and_chart(monkeypatch, tmp_path):
    milliseconds = {"full": 4.0, "compute": 3.0, "communication": 2.0}
    todo = iter([])

    def time_once(program, *args, **_):
        jax.block_until_ready(program(*args))
        return milliseconds[next(todo).part]

    cases = ring.cases

    def remember(*args):
        nonlocal todo
        found = list(cases(*args))
        todo = iter(found)
        return found

    monkeypatch.setattr(ring, "time_ms", time_once)
    monkeypatch.setattr(ring, "cases", remember)
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    arguments = ["--lengths", "256", "--heads", "2:1", "--check", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ring", *arguments])
    ring.main()
    rows = read_rows(tmp_path / "ring.jsonl")
    shares = [row["of_ideal"] for row in rows if "of_ideal" in row]
    assert shares == [0.5] * 6  # ring, all_gather, ulysses; forward, forward and backward
    assert all(max(row["errors"]) < 0.01 for row in rows if "errors" in row)
    assert sum("errors" in row for row in rows) == 3
    assert [row["overlap"] for row in rows if "overlap" in row] == [(3 + 2 - 4) / 2] * 2
    assert (tmp_path / "ring.png").exists()
