"""WikiText-103: sizes, the counts that prove the data, perplexity per published token."""

import dataclasses
import hashlib
import math
import zipfile

import pytest

from experiments.transnormer import wikitext103
from experiments.transnormer.wikitext103 import EXPERIMENT, PAPER_PERPLEXITY, check, perplexities
from longctx.data import corpora
from longctx.data.config import DataConfig, DataError
from longctx.models import count_parameters
from longctx.train.config import EvalConfig
from longctx.train.loop import train
from longctx.train.metrics import read_metrics

TEXT = b" \n = Title = \n \n Some words , and then a few more of them . \n" * 40


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A small archive in the published format, whose checksum and counts are the published ones."""
    path = tmp_path / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-103-raw/wiki.{part}.raw", TEXT)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = corpora.CORPORA["wikitext-103-raw"]
    read = corpora._wikitext("wikitext-103-raw", "raw", digest)
    monkeypatch.setitem(corpora.CORPORA, "wikitext-103-raw", dataclasses.replace(known, read=read))
    counts = {"WORDS": 40 * (14 + 4), "LINES": 40 * 4, "GPT2_TOKENS": len(TEXT) - 40 * 4}
    for name, count in counts.items():
        monkeypatch.setattr(wikitext103, name, dict.fromkeys(("train", "valid", "test"), count))
    return DataConfig(source=f"wikitext-103-raw:{path}", sequence_length=64, batch_size=2)


def test_sizes_are_those_of_the_paper():
    millions = {
        name: count_parameters(run.model) / 1e6 for name, run in EXPERIMENT.runs("paper").items()
    }
    assert millions["TNL"] == pytest.approx(45.45, rel=0.002)
    assert millions["Transformer"] == pytest.approx(44.65, rel=0.002)


def test_counts_prove_that_the_data_is_whole(data, monkeypatch, capsys):
    check(data, ("train", "valid", "test"))
    assert capsys.readouterr().out.count("720 words") == 3
    monkeypatch.setitem(wikitext103.GPT2_TOKENS, "test", 1000)
    with pytest.raises(DataError, match="bytes is not GPT-2's"):
        check(data)
    monkeypatch.setitem(wikitext103.LINES, "valid", 161)
    with pytest.raises(
        DataError, match=r"words and lines are \(720, 160\), published \(720, 161\)"
    ):
        check(data)


def test_perplexity_is_per_published_token(data, tmp_path, monkeypatch):
    run = dataclasses.replace(
        EXPERIMENT.runs("smoke")["TNL"], data=data, eval=EvalConfig(tokens=10**6)
    )
    train(run, tmp_path / "run")
    bits = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["valid_bits_per_byte"] * len(TEXT)
    monkeypatch.setitem(wikitext103.GPT2_TOKENS, "test", len(TEXT) // 2 - 160)
    found = perplexities(tmp_path / "run")
    for part, tokens in (("valid", len(TEXT)), ("test", len(TEXT) // 2)):
        expected = math.exp(bits * math.log(2) / tokens)
        assert found[f"{part}_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_table_and_figure(tmp_path):
    rows = [
        {"arm": arm, "seed": 0, "parameters": 45_400_000, "scale": "small", "tokens": 1}
        | {"device": "cpu", "valid_perplexity": 30.0, "test_perplexity": 31.0}
        for arm in PAPER_PERPLEXITY
    ]
    table = EXPERIMENT.table([rows[0] | {"source": "x"}, *rows[1:]])
    assert "| TNL | 0 | 45.40M | 30.00 | 23.46 | 31.00 | 24.03 |" in table
    EXPERIMENT.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
