"""Documents of a source, in a fixed order, split into training and held-out ones."""

import gzip
import hashlib
import json
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import IO, cast

from longctx.data.config import STDLIB, DataConfig, DataError, Document, Split
from longctx.data.corpora import is_published, published_documents

# Tests, other people's packages, and the generated help texts of pydoc (one string of 0.8 MB).
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


def documents(config: DataConfig, split: Split) -> list[Document]:
    """The non-empty documents of one split, in a fixed order.

    A document is held out when the hash of its name says so: the split is the same on every
    machine and does not change when documents are added. Of a source that is a single document,
    the last `valid_fraction` is held out instead. Published corpora have a split of their own.

    Raises:
      DataError: a path is missing, holds no text, or leaves the split empty.
    """
    source = (split == "valid" and config.valid_source) or config.source
    if is_published(source):
        return list(published_documents(source, split))
    if config.valid_source:
        return _read_all(source, config.text_field)
    found = _read_all(config.source, config.text_field)
    if len(found) == 1:
        name, text = found[0]
        cut = len(text) - int(len(text) * config.valid_fraction)
        return [(name, text[:cut] if split == "train" else text[cut:])]
    held_out = split == "valid"
    chosen = [d for d in found if _is_held_out(d[0], config.valid_fraction) == held_out]
    if not chosen:
        raise DataError(
            f"none of the {len(found)} documents of {config.source} falls into the {split} split: "
            f"change data.valid_fraction={config.valid_fraction} or give data.valid_source"
        )
    return chosen


def _is_held_out(name: str, fraction: float) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _read_all(source: str, text_field: str) -> list[Document]:
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = [p for p in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(p.relative_to(root).parts)]
    else:
        root = pathlib.Path(source)
        if not root.exists():
            raise DataError(f"data source {source} does not exist")
        files = [p for p in root.rglob("*") if p.is_file()] if root.is_dir() else [root]
    base = root if root.is_dir() else root.parent
    names = sorted((path.relative_to(base).as_posix(), path) for path in files)
    found = [d for name, path in names for d in _read_file(name, path, text_field) if d[1]]
    if not found:
        raise DataError(f"data source {source} holds no text")
    return found


def _read_file(name: str, path: pathlib.Path, text_field: str) -> Iterator[Document]:
    packed = path.suffix == ".gz"
    match path.with_suffix("").suffix if packed else path.suffix:
        case ".jsonl":
            read = _read_jsonl
        case ".parquet":
            read = _read_parquet
        case _:
            read = _read_text
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            yield from read(name, cast(IO[bytes], file), text_field)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_text(name: str, file: IO[bytes], text_field: str) -> Iterator[Document]:
    yield name, file.read()


def _read_jsonl(name: str, file: IO[bytes], text_field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise DataError(f"{name}, line {number}: not JSON: {error}") from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{name}, line {number}: no string in field {text_field!r}")
        yield f"{name}:{number}", text.encode(errors="replace")  # JSON may escape half a character


def _read_parquet(name: str, file: IO[bytes], text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"{name} needs the extra: pip install longctx[text]") from None
    try:
        content = pyarrow.parquet.ParquetFile(file)
        if text_field not in content.schema_arrow.names:
            raise DataError(f"{name} has no column {text_field!r}")
        column = content.read([text_field])[text_field]
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} cannot be read as parquet: {error}") from error
    for number, text in enumerate(column.to_pylist(), start=1):
        if not isinstance(text, str):
            raise DataError(f"{name}, row {number}: column {text_field!r} holds no string")
        yield f"{name}:{number}", text.encode()
