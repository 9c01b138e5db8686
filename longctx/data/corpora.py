"""Published corpora as data: sources named `NAME:PATH`, where PATH is what the publisher gives.

`NAME:PATH` is split as published; `NAME/PART:PATH` is one part whatever the split, so that
`--data.valid-source wikitext-103-raw/test:PATH` scores the test part. What is there is checked
against the published size, checksum or count before anything is trained on it.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO

from longctx.data.config import DataError, Document, Split

type Reader = Callable[[pathlib.Path, str], Iterator[Document]]

OPENWEBTEXT2_DOCUMENTS = 17_103_059
PARTS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where a corpus is had, what a user's path must be, and how a part of it is read."""

    home: str
    holds: str
    read: Reader


def _characters(md5: str) -> Reader:
    """100 MB, of which the last 5 + 5 MB are held out: the customary split."""
    ends = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, None)}

    def read(path: pathlib.Path, part: str) -> Iterator[Document]:
        text = path.read_bytes()
        _check(len(text) == 100_000_000, f"{path} has {len(text):,} bytes instead of 100,000,000")
        _check(hashlib.md5(text).hexdigest() == md5, f"{path} does not have the MD5 sum {md5}")
        yield part, text[slice(*ends[part])]

    return read


def _wikitext(folder: str, ending: str, sha256: str) -> Reader:
    """The articles of a zip file with the members wiki.{train,valid,test}."""

    def read(path: pathlib.Path, part: str) -> Iterator[Document]:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check(found == sha256, f"{path} does not have the SHA-256 sum {sha256}")
        with zipfile.ZipFile(path) as archive:
            yield from articles(part, archive.read(f"{folder}/wiki.{part}.{ending}"))

    return read


def articles(part: str, text: bytes) -> Iterator[Document]:
    """The articles of a WikiText file, which begin with headings of the first level."""
    starts = [match.start() for match in re.finditer(rb"^ = [^=\n]+ = $", text, re.M)]
    for number, (first, last) in enumerate(zip([0, *starts[1:]], [*starts[1:], None], strict=True)):
        yield f"{part}:{number}", text[first:last]


def _books(path: pathlib.Path, part: str) -> Iterator[Document]:
    """PG-19's folders of one text file per book."""
    folder, count = {
        "train": ("train", 28_602),
        "valid": ("validation", 50),
        "test": ("test", 100),
    }[part]
    files = sorted((path / folder).glob("*.txt"))
    _check(len(files) == count, f"{path / folder} has {len(files):,} books instead of {count:,}")
    for file in files:
        yield f"{part}/{file.name}", file.read_bytes()


def _web(path: pathlib.Path, part: str) -> Iterator[Document]:
    """OpenWebText2's tar file of .jsonl.zst files; one document in a thousand is held out."""
    _check(part != "test", "openwebtext2 has no test part")
    count = 0
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            for line in _zstd_lines(file) if file and member.name.endswith(".zst") else ():
                count += 1
                if (count % 1000 == 0) == (part == "valid"):
                    yield f"{member.name}:{count}", json.loads(line)["text"].encode()
    wanted = OPENWEBTEXT2_DOCUMENTS
    _check(count == wanted, f"{path} has {count:,} documents instead of {wanted:,}")


def _zstd_lines(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise DataError("openwebtext2 needs the extra: pip install longctx[text]") from None
    return iter(io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")))


CORPORA = {
    "enwik8": Corpus(
        "mattmahoney.net/dc/textdata.html",
        "the unpacked file enwik8",
        _characters("a1fa5ffddb56f4953e226637dabbb36a"),
    ),
    "text8": Corpus(
        "mattmahoney.net/dc/textdata.html",
        "the unpacked file text8",
        _characters("3bea1919949baf155f99411df5fada7e"),
    ),
    "wikitext-103": Corpus(
        "arxiv.org/abs/1609.07843",
        "wikitext-103-v1.zip, with <unk>",
        _wikitext(
            "wikitext-103",
            "tokens",
            "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        ),
    ),
    "wikitext-103-raw": Corpus(
        "arxiv.org/abs/1609.07843",
        "wikitext-103-raw-v1.zip, without <unk>",
        _wikitext(
            "wikitext-103-raw",
            "raw",
            "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        ),
    ),
    "pg19": Corpus(
        "github.com/google-deepmind/pg19",
        "the folder of train/, validation/ and test/",
        _books,
    ),
    "openwebtext2": Corpus("openwebtext2.readthedocs.io", "openwebtext2.jsonl.zst.tar", _web),
}


def is_published(source: str) -> bool:
    """Whether `source` is `NAME:PATH` or `NAME/PART:PATH` of a corpus above."""
    return source.partition(":")[0].partition("/")[0] in CORPORA and ":" in source


def published_documents(source: str, split: Split) -> Iterator[Document]:
    """The documents of a split, or of the part that `source` names.

    Raises:
      DataError: there is no such part, nothing at the path, or not what was published.
    """
    name, _, place = source.partition(":")
    name, _, part = name.partition("/")
    part, path, corpus = part or split, pathlib.Path(place), CORPORA[name]
    if part not in PARTS:
        raise DataError(f"data source {source}: the parts are {', '.join(PARTS)}")
    if not path.exists():
        raise DataError(
            f"data source {name}: {path} does not exist; it must be {corpus.holds} ({corpus.home})"
        )
    try:
        yield from corpus.read(path, part)
    except (zipfile.BadZipFile, tarfile.TarError, IsADirectoryError) as error:
        raise DataError(f"data source {name}: {path} is not {corpus.holds}: {error}") from error


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise DataError(f"{problem}: it is incomplete or another version")
