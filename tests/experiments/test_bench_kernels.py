"""The kernel benchmarks measure all that they judge, and name what is absent."""

import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import _flash_report as flash_report
from experiments.bench import _lightning_peers, flash, lightning
from experiments.bench import _lightning_report as lightning_report
from experiments.bench._claims import Claim, claims_table
from longctx.device.programs import bytes_needed, compile_all
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


def test_flatness_is_judged_for_each_number_of_heads():
    slow = {"forward_ns_per_token": 5.5}
    rows = [
        {**r, **slow} if (r["batch"], r["length"]) == (4, 1 << 20) else r for r in lightning_rows()
    ]
    flat = [c for c in lightning_report.claims(rows) if c.what.startswith("largest over smallest")]
    assert len(flat) == 8  # 16, 32, 64 and 128 heads, forward and with the backward
    (missed,) = (c for c in flat if c.verdict == "MISSED")
    assert missed.what.endswith("forward, 16384 to 1048576 tokens, 64 heads in all")
    assert missed.ratio == pytest.approx(1.1)


def test_what_the_device_has_no_room_for_is_named(monkeypatch):
    shape = _lightning_peers.Shape(1, 128, heads=2, width=16, dtype=jnp.float32)
    compiled = compile_all(_lightning_peers.lowerings("ours", shape))

    class Device:
        def memory_stats(self):
            return {"bytes_limit": bytes_needed(compiled[0])}  # of the forward

    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: [Device()])
        programs = [lightning.fitted(program) for program in compiled]
    (row,) = lightning.measure("lengths", shape, {"ours": programs}, seconds=0.0)
    assert row["forward_ms"] > 0 and "both_ms" not in row
    assert row["absent"].startswith("RuntimeError: needs 0.0 GB of 0.0 GB")
    alive = [x for x in jax.live_arrays() if x.shape == (1, 128, 2, 16)]
    assert alive == [], "the memory is free for the next length"
    lightning.add_floors([row], rate=1e9)
    table = lightning_report.table([row])
    assert f"| {row['forward_ms']:.3f} | absent: RuntimeError: needs" in table


def test_lightning_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    shape = _lightning_peers.Shape(1, 128, heads=2, width=16, dtype=jnp.float32)
    groups = {"lengths": [shape, shape._replace(length=256)]}
    monkeypatch.setattr(lightning, "groups_for", lambda platform: groups)
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out)])
    lightning.main()
    short, long = read_rows(out)
    assert (short["length"], long["length"]) == (128, 256)
    assert short["copy_bytes_per_second"] == long["copy_bytes_per_second"]
    floor = 11 * 128 * 2 * 16 * 4 / short["copy_bytes_per_second"] * 1e3
    assert short["both_floor_ms"] == pytest.approx(floor)
    assert short["both_of_floor"] == pytest.approx(floor / short["both_ms"])
    assert f"| 1 x 256, 2 | ours | {long['forward_ms']:.3f} (" in capsys.readouterr().out
    assert (tmp_path / "rows.png").exists()
    monkeypatch.setattr(sys, "argv", ["bench", "--groups", "shapes"])
    with pytest.raises(SystemExit):
        lightning.main()
    assert "invalid choice: 'shapes'" in capsys.readouterr().err


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
