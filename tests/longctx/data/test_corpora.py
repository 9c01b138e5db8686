"""Published corpora: their splits, and what is said when the path does not hold what it must."""

import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile

import pyarrow
import pytest

from longctx.data import corpora
from longctx.data.config import DataConfig, DataError
from longctx.data.corpora import CORPORA, articles
from longctx.data.sources import documents

WIKI = (
    b" \n = Robert = \n \n Robert is . \n = = Life = = \n \n Long . \n = Tom = \n Tom is , too . \n"
)


def part(source, split="train"):
    return documents(DataConfig(source=source), split)


@pytest.fixture(scope="module")
def enwik8(tmp_path_factory):
    """A file of the published size; its checksum is put into the table by the test."""
    path = tmp_path_factory.mktemp("enwik8") / "enwik8"
    path.write_bytes(b"0123456789" * 10**7)
    return path


def test_hundred_megabytes_are_cut_as_is_customary(enwik8, monkeypatch):
    with pytest.raises(DataError, match="does not have the MD5 sum a1fa5ffddb56"):
        part(f"enwik8:{enwik8}")
    digest = hashlib.md5(enwik8.read_bytes()).hexdigest()
    ours = dataclasses.replace(CORPORA["enwik8"], read=corpora._characters(digest))
    monkeypatch.setitem(CORPORA, "enwik8", ours)
    for source, split, size in (
        ("enwik8", "train", 90_000_000),
        ("enwik8", "valid", 5_000_000),
        ("enwik8/test", "valid", 5_000_000),
    ):
        ((_, text),) = part(f"{source}:{enwik8}", split)
        assert len(text) == size
    shorter = enwik8.with_name("shorter")
    shorter.write_bytes(b"x" * 999)
    with pytest.raises(DataError, match="has 999 bytes instead of 100,000,000"):
        part(f"text8:{shorter}")


def test_articles_begin_with_headings_of_the_first_level():
    names, texts = zip(*articles("train", WIKI), strict=True)
    assert len(set(names)) == 2
    assert b"".join(texts) == WIKI
    assert b" = Robert = " in texts[0] and b"Life" in texts[0]


def test_wikitext_is_read_from_the_archive_that_was_published(tmp_path, monkeypatch):
    path = tmp_path / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train", "valid", "test"):
            archive.writestr(f"wikitext-103-raw/wiki.{name}.raw", WIKI * len(name))
    with pytest.raises(DataError, match="does not have the SHA-256 sum 91c00ae"):
        part(f"wikitext-103-raw:{path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    read = corpora._wikitext("wikitext-103-raw", "raw", digest)
    ours = dataclasses.replace(CORPORA["wikitext-103-raw"], read=read)
    monkeypatch.setitem(CORPORA, "wikitext-103-raw", ours)
    assert len(part(f"wikitext-103-raw:{path}")) == 2 * len("train")
    config = DataConfig(
        source=f"wikitext-103-raw:{path}", valid_source=f"wikitext-103-raw/test:{path}"
    )
    assert len(documents(config, "valid")) == 2 * len("test")


def test_books_are_counted(tmp_path):
    for i in range(50):
        (tmp_path / "validation").mkdir(exist_ok=True)
        (tmp_path / "validation" / f"{i}.txt").write_text(f"book {i}")
    assert len(part(f"pg19:{tmp_path}", "valid")) == 50
    with pytest.raises(DataError, match="test has 0 books instead of 100: it is incomplete"):
        part(f"pg19/test:{tmp_path}")


def test_web_pages_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "openwebtext2.jsonl.zst.tar"
    lines = "".join(json.dumps({"text": f"page {i}", "meta": {}}) + "\n" for i in range(1000))
    packed = pyarrow.compress(lines.encode(), codec="zstd", asbytes=True)
    with tarfile.open(path, "w") as archive:
        for name in ("2019-01.jsonl.zst", "2019-02.jsonl.zst"):
            entry = tarfile.TarInfo(name)
            entry.size = len(packed)
            archive.addfile(entry, io.BytesIO(packed))
    with pytest.raises(DataError, match="has 2,000 documents instead of 17,103,059"):
        part(f"openwebtext2:{path}")
    monkeypatch.setattr(corpora, "OPENWEBTEXT2_DOCUMENTS", 2000)
    assert len(part(f"openwebtext2:{path}")) == 1998
    assert [text for _, text in part(f"openwebtext2:{path}", "valid")] == [b"page 999"] * 2


def test_what_a_path_must_be_is_said(tmp_path):
    with pytest.raises(DataError, match=r"must be the unpacked file text8 \(mattmahoney"):
        part(f"text8:{tmp_path / 'nothing'}")
    with pytest.raises(DataError, match="the parts are train, valid, test"):
        part(f"pg19/dev:{tmp_path}")
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(DataError, match=r"is not openwebtext2\.jsonl\.zst\.tar"):
        part(f"openwebtext2:{tmp_path / 'x.tar'}")
    with pytest.raises(DataError, match="is not the unpacked file enwik8"):
        part(f"enwik8:{tmp_path}")
