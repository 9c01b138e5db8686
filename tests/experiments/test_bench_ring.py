"""The ring benchmark runs every program it would time, and its rows say what they must."""

import sys

import jax
import pytest

from experiments.bench.ring import __main__ as command
from experiments.bench.ring import attention, schedule
from experiments.bench.ring.programs import Case
from longctx.provenance import read_rows


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["ring", *map(str, arguments)])
    module.main()


def test_every_shape_that_is_claimed_is_among_the_cases(monkeypatch):
    asked = {}
    monkeypatch.setattr(attention, "measure", lambda options: asked.update(vars(options)) or [])
    monkeypatch.setitem(command.GROUPS, "attention", command.Group(attention.measure, str))
    run(monkeypatch, command, "--groups", "attention", "--devices", 1, 2, 4, 8)
    options = type("Options", (), asked)
    found = set(attention.cases(options))
    for heads in ((16, 16), (64, 8)):
        for which in ("forward", "forward_backward"):
            for strategy in ("ring", "all_gather", "ulysses", "usp"):
                for local in (8192, 32768):
                    assert Case(8 * local, *heads, which, strategy, 8) in found
            assert Case(131072, *heads, which, "ring", 2) in found
            assert Case(131072, *heads, which, "ours") in found
            assert {part for *_, n, part in found if n == 2} == {"full", "compute", "communication"}
    for case in found:
        case.layout.check(case.length, case.devices)


@pytest.mark.slow
def test_rows_and_chart(monkeypatch, tmp_path):
    milliseconds = {"full": 4.0, "compute": 3.0, "communication": 2.0}
    todo = iter([])

    def time_once(program, *args, **_):
        jax.block_until_ready(program(*args))
        return milliseconds[next(todo).part]

    cases = attention.cases

    def remember(options):
        nonlocal todo
        found = list(cases(options))
        todo = iter(found)
        return found

    monkeypatch.setattr(attention, "time_ms", time_once)
    monkeypatch.setattr(attention, "cases", remember)
    sizes = ("--devices", 1, 2, "--per-device", 128, "--totals", 256, "--heads", "2:1")
    run(monkeypatch, command, *sizes, "--smoke", "--memory", 1.5e7, "--out", tmp_path)
    rows = read_rows(tmp_path / "ring.jsonl")
    shares = [row["of_ideal"] for row in rows if "of_ideal" in row]
    assert shares == [0.5] * 6  # ring, all_gather, ulysses; forward, forward and backward
    single = next(row["errors"] for row in rows if row.get("name") == "ours" and "errors" in row)
    sharded = [row["errors"] for row in rows if "errors" in row and row["devices"] == 2]
    assert len(sharded) == 3
    for errors in sharded:
        assert all(errors[x] <= 1.1 * single[x] for x in ("o", "dq", "dk", "dv"))
    assert [row["overlap"] for row in rows if "overlap" in row] == [(3 + 2 - 4) / 2] * 2
    training = [row for row in rows if row["group"] == "training"]
    assert {(row["model"], row["devices"]) for row in training} == {
        (model, devices) for model in ("TNL", "Transformer") for devices in (1, 2)
    }
    longest = [row for row in rows if row["group"] == "longest"]
    assert len(longest) == 4
    assert all(
        row["ran"] and row["length"] == row["devices"] * row["per_device"] for row in longest
    )
    assert (tmp_path / "ring.png").exists()


@pytest.mark.slow
def test_schedules_are_read_once(monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    what = ("v5e", "--devices", 4, "--heads", "2:2", "--per-device", 256, "--strategies", "ring")
    for _ in range(2):
        run(monkeypatch, schedule, *what, "--out", tmp_path)
    (row,) = read_rows(tmp_path / "ring_schedule_v5e.jsonl")
    assert row["moves"]["collective-permute"]["count"] == 8
    assert row["moves"]["collective-permute"]["exposed_bytes"] == 0
    assert row["temporary_bytes"] > 0
