import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from longctx.data.config import DataConfig, DataError
from longctx.data.sources import documents

TEXTS = [f"text number {i}\n" for i in range(40)]


def both_splits(**fields):
    config = DataConfig(**fields)
    return documents(config, "train"), documents(config, "valid")


def test_standard_library_is_split_by_file_and_always_the_same():
    train, valid = both_splits()
    names = [name for name, _ in train + valid]
    assert len(set(names)) == len(names) > 400
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert {"test", "tests", "site-packages"}.isdisjoint({n.split("/")[-2:][0] for n in names})
    assert [name for name, _ in train] == sorted(name for name, _ in train)
    # The hash does not depend on the machine: these two files stay where they are.
    assert "sched.py" in [name for name, _ in valid]
    assert "os.py" in [name for name, _ in train]
    share = len(valid) / len(names)
    assert 0.03 < share < 0.08


def test_split_of_a_document_does_not_change_when_others_are_added(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    before = documents(DataConfig(source=str(tmp_path), valid_fraction=0.3), "valid")
    for i in range(30, 40):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    after = documents(DataConfig(source=str(tmp_path), valid_fraction=0.3), "valid")
    assert set(before) < set(after)


def test_jsonl_parquet_and_gzip_hold_the_same_text(tmp_path):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress((tmp_path / "c.parquet").read_bytes()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.parquet.gz"):
        train, valid = both_splits(
            source=str(tmp_path / name), text_field="body", valid_fraction=0.2
        )
        texts = {text.decode() for _, text in train} | {text.decode() for _, text in valid}
        assert texts == set(TEXTS)
        assert len(train) + len(valid) == len(TEXTS)


def test_the_end_of_a_single_text_is_held_out(tmp_path):
    path = tmp_path / "book.txt.gz"
    with gzip.open(path, "wb") as file:
        file.write(bytes(range(100)))
    train, valid = both_splits(source=str(path), valid_fraction=0.1)
    assert train[0][1] + valid[0][1] == bytes(range(100))
    assert len(valid[0][1]) == 10


def test_separate_held_out_source(tmp_path):
    (tmp_path / "a.txt").write_text("train")
    (tmp_path / "b.txt").write_text("held out")
    train, valid = both_splits(source=str(tmp_path / "a.txt"), valid_source=str(tmp_path / "b.txt"))
    assert (train[0][1], valid[0][1]) == (b"train", b"held out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "line 1: no string in field 'text'"),
        ("latin.jsonl", b'{"text": "\xff"}\n', "line 1: not JSON"),
        ("cut.txt.gz", gzip.compress(b"x" * 1000)[:-9], "not a complete gzip file"),
        ("bent.txt.gz", gzip.compress(b"x")[:10] + b"\xff" * 9, "not a complete gzip file"),
        ("plain.txt.gz", b"not packed", "not a complete gzip file"),
        ("broken.parquet", b"PAR1", "cannot be read as parquet"),
    ],
    ids=[
        *("absent", "empty", "cut line", "no field", "not UTF-8"),
        *("cut gzip", "bent gzip", "no gzip", "no parquet"),
    ],
)
def test_unreadable_source(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        documents(DataConfig(source=str(path)), "train")
    assert name in str(caught.value)


def test_half_a_character_in_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')
    found = documents(DataConfig(source=str(path), valid_source=str(path)), "train")
    assert [text for _, text in found] == [b"a?b", b"c"]


def test_parquet_without_the_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    with pytest.raises(DataError, match="no column 'text'"):
        documents(DataConfig(source=str(path)), "train")


def test_a_split_without_documents_is_an_error(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    with pytest.raises(DataError, match=re.escape("falls into the valid split")):
        documents(DataConfig(source=str(tmp_path), valid_fraction=1e-6), "valid")
