"""`python -m experiments.plans` remakes the rows asked for and keeps the others."""

import dataclasses
import sys

import pytest

from experiments.plans import __main__ as plans
from longctx.parallel import MeshConfig
from longctx.provenance import read_rows
from tests.longctx.train.runs import tiny_run


def remake(monkeypatch, *names):
    monkeypatch.setattr(sys, "argv", ["plans", *names])
    plans.main()


def test_rows_are_remade_by_name(monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    tiny = dataclasses.replace(tiny_run("."), mesh=MeshConfig(fsdp=4))
    two = {"fits": ("v5e:2x2", tiny), "too few devices": ("v5e:4x4", tiny)}
    monkeypatch.setattr(plans, "PLANS", two)
    monkeypatch.setattr(plans, "RESULTS", tmp_path / "results" / "plans.jsonl")
    remake(monkeypatch, "too few devices")
    (refused,) = read_rows(plans.RESULTS)
    assert "v5e:4x4 has 16 devices" in refused["refused"] and refused["mesh"]["fsdp"] == 4
    remake(monkeypatch, "fits")
    fits, kept = read_rows(plans.RESULTS)
    assert kept == refused and fits["run"] == "fits" and fits["fits"] and fits["devices"] == 4


def test_unknown_names_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        remake(monkeypatch, "TNL 8B")
    assert "invalid choice: 'TNL 8B' (choose from 'TNL 7B, 128K tokens'" in capsys.readouterr().err
