import itertools

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from longctx.data.config import DataConfig, DataError
from longctx.data.packing import Windows, pack
from longctx.data.pipeline import load_corpus, train_batches
from longctx.data.tokenizer import ByteTokenizer

B = ByteTokenizer.boundary
CORPUS = pack([("a", b"abc"), ("b", b"defgh"), ("c", b"i")], ByteTokenizer())


def batches_of(config, **where):
    return train_batches(CORPUS, config, **where)


def test_packing():
    assert CORPUS.tokens.tolist() == [B, *b"abc", B, *b"defgh", B, *b"i"]
    assert CORPUS.starts.tolist() == [0, 4, 10]
    assert CORPUS.bytes_per_token == 9 / 12


def test_windows_cover_every_target_once_and_know_their_documents():
    windows = Windows(CORPUS, 3)
    assert len(windows) == 3
    targets = np.concatenate([windows[i]["targets"] for i in range(3)])
    assert targets.tolist() == CORPUS.tokens[1:10].tolist()
    assert windows[1]["tokens"].tolist() == [*b"c", B, *b"d"]
    assert windows[1]["doc_start"].tolist() == [0, 1, 1]
    assert windows[2]["doc_start"].tolist() == [0, 0, 0]  # the document began earlier
    whole = Windows(CORPUS, 11)[0]
    assert whole["doc_start"].tolist() == [0] * 4 + [4] * 6 + [10]
    assert {whole[f].dtype for f in ("tokens", "targets", "doc_start")} == {np.dtype(np.int32)}


def test_sequence_longer_than_the_corpus():
    assert len(Windows(CORPUS, 11)) == 1
    message = (
        "12 tokens and its targets is longer than the train split of 12 tokens: lower data.seq"
    )
    with pytest.raises(DataError, match=message):
        Windows(CORPUS, 12)


def test_a_held_out_part_that_is_too_short_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    held_out = load_corpus(DataConfig(source=str(tmp_path / "a.txt")), "valid", vocab_size=257)
    with pytest.raises(DataError, match=r"valid split of 51 tokens.*data\.valid_fraction or give"):
        held_out.windows(64)


def test_held_out_text_beside_a_task_is_refused():
    config = DataConfig(source="task:mqar", valid_source="a.txt")
    with pytest.raises(DataError, match=r"data\.valid_source=a\.txt must be empty"):
        load_corpus(config, "train", vocab_size=257)


def test_tokenizing_shows_a_bar_on_a_terminal_only(monkeypatch, capsys):
    pack([("a", b"abc")], ByteTokenizer())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Progress(console=Console(stderr=True)):  # another live display
        corpus = pack([("a", b"abc")], ByteTokenizer())
    assert corpus.tokens.tolist() == [B, *b"abc"]
    assert "tokenizing" in capsys.readouterr().err


def test_each_pass_is_complete_and_in_a_new_order():
    batches = batches_of(DataConfig(sequence_length=1, batch_size=11))
    first, second = (next(batches)["index"].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    other = next(batches_of(DataConfig(sequence_length=1, batch_size=11, seed=1)))
    assert other["index"].tolist() != first


def test_batches_of_one_sequence():
    batches = batches_of(DataConfig(sequence_length=5, batch_size=1))
    assert sorted(next(batches)["index"].item() for _ in range(2)) == [0, 1]


def test_resumes_exactly():
    config = DataConfig(sequence_length=2, batch_size=2)
    batches = batches_of(config)
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    wanted = [next(batches) for _ in range(5)]
    resumed = batches_of(config)
    resumed.set_state(state)
    for want in wanted:
        got = next(resumed)
        for field in want:
            np.testing.assert_array_equal(got[field], want[field])


def test_parts_share_out_the_same_batches():
    config = DataConfig(sequence_length=1, batch_size=4)
    alone = itertools.islice(batches_of(config), 7)
    parts = [batches_of(config, part=i, parts=2) for i in range(2)]
    for whole in alone:
        rows = [next(part)["index"] for part in parts]
        assert [len(r) for r in rows] == [2, 2]
        assert sorted(np.concatenate(rows)) == sorted(whole["index"])
    with pytest.raises(DataError, match="batch_size=4 must divide by 3 processes"):
        batches_of(config, part=0, parts=3)


def test_token_outside_the_vocabulary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain text" * 5)
    config = DataConfig(source=str(path), sequence_length=4)
    assert load_corpus(config, "train", vocab_size=257).tokens.max() == 256
    with pytest.raises(DataError, match="token 256 of the train split is outside the vocabulary"):
        load_corpus(config, "train", vocab_size=256)
