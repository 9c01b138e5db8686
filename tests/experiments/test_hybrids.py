"""Hybrids and longest contexts: what is compared, how tables read, how the search goes."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import lines
from experiments.hybrids import recall
from experiments.ring_attention import max_context
from longctx.errors import UserError
from longctx.eval.recall import DEPTHS
from pallas_kernels.flash_attention import flash_attention


def test_arms_differ_by_their_mixers_alone():
    runs = recall.EXPERIMENT.runs("small")
    assert runs.keys() == recall.ARMS.keys()
    assert len({str(run.model) for run in runs.values()}) == len(recall.ARMS)
    kinds = {name: run.model.layer_kinds() for name, run in runs.items()}
    assert kinds["7 lightning : 1"].count("softmax") == 1
    assert kinds["3 lightning : 1"].count("softmax") == 2
    assert kinds["1 lightning : 1"].count("softmax") == 4
    assert kinds["softmax"] == ("softmax",) * 8
    for run in runs.values():
        short = "mqar-often@32+mqar-often@64+mqar-often@128"
        assert run.data.source == f"task:{short}+mqar+mqar-64+needle"
        assert (run.data, run.optim) == (runs["softmax"].data, runs["softmax"].optim)
        residual = run.model.residual
        assert residual.mlp[1] < residual.softmax[1] == residual.lightning[1] < 1


def rows(arm, mqar, needle, speed):
    row = {"arm": arm, "scale": "small", "parameters": 10**6, "tokens": 10**6, "trained": 256}
    row |= {"paper": recall.ARMS[arm][1], "tokens_per_second": speed, "device": "cpu"}
    for length in (256, 512):
        yield row | {"task": "mqar", "length": length, "depth": None, "accuracy": mqar, "chance": 0}
        for depth in DEPTHS:
            found = {"task": "needle", "length": length, "depth": depth, "accuracy": needle * depth}
            yield row | found | {"chance": 0.0}


def test_recall_table_figure_and_lines(tmp_path):
    found = [*rows("lightning", 0.4, 0.2, 2e6), *rows("7 lightning : 1", 0.99, 1.0, 1e6)]
    table = recall.EXPERIMENT.table(found)
    assert "| 7 lightning : 1 | 1.0M | 1,000,000 | 0.990 | 0.500 | 0.990 | 0.500 | 95.7 |" in table
    recall.EXPERIMENT.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    *_, mqar, needle = lines.hybrids(found)
    assert (mqar.ours, mqar.theirs) == ("0.990", "")
    assert (needle.ours, needle.theirs) == ("0.500", "95.7 (per cent)")
    assert "50% of the fastest" in needle.what


def test_quadratic_attention_is_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 24, 2, 8)) for key in keys)
    np.testing.assert_allclose(max_context.quadratic(q, k, v), flash_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("limit", "tried"), [(4096, [2048, 4096, 8192]), (600, [2048, 1024, 512])])
def test_the_search_ends_at_the_longest_context_that_fits(limit, tried, monkeypatch):
    def report_of(config, topology):
        length = config.data.sequence_length
        if length > 4 * limit:
            raise UserError("the step does not compile: out of memory")
        memory = {"all": length * 10**6, "available": limit * 10**6}
        return {"bytes_per_device": memory, "fits": length <= limit} | dict.fromkeys(
            ("parameters", "device_kind")
        )

    monkeypatch.setattr(max_context, "report_of", report_of)
    pod = dataclasses.replace(max_context.V5E, first={"vanilla": 2048})
    found = list(max_context._search(pod, "vanilla", 4))
    assert [row["length"] for row in found] == tried
    (best,) = max_context.longest(found)
    assert best["length"] == max(n for n in tried if n <= limit)
    (line,) = lines.max_context(found)
    assert line.ratio == best["length"] / 2048
    assert "analysis" in line.what
    table = max_context.EXPERIMENT.table(found)
    assert f"| v5e:16x16 | vanilla | 1 | {best['length']:,} |" in table


def test_methods_differ_as_they_should():
    (pod,) = max_context.PODS["small"]
    runs = {method: max_context.run(pod, method, 2**20) for method in max_context.METHODS}
    assert {run.mesh.size for run in runs.values()} == {256}
    assert [run.model.mlp.chunk > 0 for run in runs.values()] == [False, False, True, True]
    assert runs["ring"].mesh.seq == 16 and runs["ring"].parallel.strategy == "ring"
    assert all(run.model.remat == "block" for run in runs.values())
