"""`longctx check-device`: what it compares, and that nothing wrong passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.cli import main
from longctx.device import check as command
from longctx.device.cases import Check, checks
from longctx.device.check import worst_error
from longctx.provenance import read_rows

SMALL = ("--length", "40", "--tokens", "64")


def run(tmp_path, *arguments):
    out = tmp_path / "rows.jsonl"
    try:
        main(["check-device", "--out", str(out), *SMALL, *arguments])
        failed = False
    except SystemExit:
        failed = True
    return read_rows(out), failed


def check_only(monkeypatch, operator):
    """Let the only check be that of `operator`."""
    check = Check("only this", operator, ((2, 8),) * 3, "float32")
    monkeypatch.setattr(command, "checks", lambda: [check])


@pytest.mark.parametrize(
    "only",
    [
        "lightning, packed",
        pytest.param("flash, any intervals", marks=pytest.mark.slow),
        pytest.param("flash, two hops", marks=pytest.mark.slow),
    ],
)
def test_rows_say_what_ran_where(tmp_path, only):
    (row,), failed = run(tmp_path, "--only", only)
    assert not failed and row["right"] and row["wrong"] is None
    assert row["check"].startswith(only) and row["length"] == 40
    assert 0 < row["error"] < row["tolerance"]
    assert row["device"] == jax.devices()[0].device_kind and "jax" in row["versions"]
    assert "forward_ms" not in row  # which one width of each dtype has


def test_times(tmp_path):
    rows, _ = run(tmp_path, "--only", "lightning, width 128")
    assert [r["dtype"] for r in rows] == ["bfloat16", "float16", "float32"]
    assert all(r["forward_ms"] > 0 and r["forward_backward_ms"] > 0 for r in rows)
    assert {r["tokens"] for r in rows} == {64}


@pytest.mark.slow
def test_every_feature_is_right_here(tmp_path, monkeypatch):
    features = [check for check in checks() if "width" not in check.name]
    monkeypatch.setattr(command, "checks", lambda: features)
    rows, failed = run(tmp_path)
    assert not failed and len(rows) == len(features) > 15


def test_every_dtype_and_width_has_a_check():
    found = {(c.name, c.dtype) for c in checks()}
    assert len(found) == len(checks())
    for family in ("lightning", "flash"):
        for width in (64, 128, 256):
            for dtype in command.TOLERANCE:
                assert (f"{family}, width {width}", dtype) in found


FAULTS = {
    "output": lambda x: x.at[0, -1].multiply(2),
    "gradient": lambda x: 1.1 * x - jax.lax.stop_gradient(0.1 * x),
    "not a number": lambda x: x.at[0, -1].multiply(jnp.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails(tmp_path, monkeypatch, capsys, fault):
    def faulty(backend, q, k, v):
        right = q * k + v
        return v, right if backend == "reference" else FAULTS[fault](right)

    check_only(monkeypatch, faulty)
    (row,), failed = run(tmp_path)
    assert failed and not row["right"]
    assert "wrong on this device: only this (float32)" in capsys.readouterr().err


def test_one_that_does_not_run_fails_and_says_why(tmp_path, monkeypatch):
    def broken(backend, q, k, v):
        raise RuntimeError("no such instruction")

    check_only(monkeypatch, broken)
    (row,), failed = run(tmp_path)
    assert failed and row["wrong"] == "does not run: no such instruction"


def test_a_refusal_is_told(monkeypatch):
    # As on a GPU, whose kernels do not take float32.
    (check,) = (c for c in checks() if c.name == "flash, width 64" and c.dtype == "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    backend, refusal = command._backend(check, check.draw(8, 1))
    assert backend == "xla" and refusal is not None and "float32" in refusal


def test_worst_error_never_hides_anything():
    one, inf = np.ones(3), np.full(3, -np.inf)
    assert worst_error((one, inf), (one, inf)) == 0
    assert np.isnan(worst_error((one, one * np.nan), (one, one)))
    assert np.isnan(worst_error((one * np.nan, one), (one, one)))
    assert not worst_error((one, one), (one, inf)) <= 1
    assert not worst_error((one, inf), (one, one)) <= 1
    assert np.isnan(worst_error(one, np.ones(4)))
    assert worst_error(one, np.zeros(3)) > 1


def test_unknown_check(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["check-device", "--out", str(tmp_path / "x"), "--only", "nothing"])
    assert "no check has 'nothing' in its name" in capsys.readouterr().err
