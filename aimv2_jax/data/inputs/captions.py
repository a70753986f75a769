"""Pairs out of a table beside its pictures: captions.jsonl or captions.csv, each row naming its picture."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from aimv2_jax.data.inputs import files
from aimv2_jax.data.inputs.samples import Damage, Sample
from aimv2_jax.data.inputs.texts import ENCODING, parse_object, readable, stored
from aimv2_jax.errors import UserError

IMAGES = ("file_name", "image", "path", "filename", "filepath")
CHUNK_ROWS = 10_000
_MAX_LINE_BYTES = 16 << 20
_ROWS_ASKED = 1000
_PICTURES_WEIGHED = 32


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a table; `values` is None if it cannot be read."""

    values: dict[str, Any] | None
    num_bytes: int = 0


def recognise(head: bytes, path: str) -> str | None:
    """ "jsonl", "csv" or None, for a table that begins with `head`."""
    if b"\0" in head:
        return None
    name = path.lower()
    first = next((line for line in head.splitlines() if line.strip()), b"")
    # A line that is longer than `head` cannot be read, but tells by its beginning.
    if name.endswith(".jsonl") or parse_object(first) is not None:
        return "jsonl"
    columns = next(csv.reader([_decode(first)], delimiter=_delimiter(first)), []) if first else []
    if name.endswith((".csv", ".tsv")) or (len(columns) > 1 and _image_column(columns) is not None):
        return "csv"
    return None


def complaint(path: str, kind: str) -> UserError | None:
    """What is wrong with the table if none of its first rows names a picture."""
    found = fields(path, kind)
    if found is None or _image_column(found) is not None:
        return None
    return UserError(f"table names no pictures ({path})", found, "It was looked for " + ", ".join(IMAGES))


def fields(path: str, kind: str, start: int = 0) -> list[str] | None:
    """The columns of a csv, or the keys in the first rows of a jsonl; None if no row can be read."""
    with files.open_file(path) as file:
        if kind == "csv":
            return _header(file) or None
        found: dict[str, None] = {}
        for row in itertools.islice(_rows(file, kind), start, start + _ROWS_ASKED):
            found |= dict.fromkeys(row.values or {})
        return list(found) or None


def chunks(path: str, kind: str, num_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, estimated bytes with the pictures) of each run of `CHUNK_ROWS` rows."""
    with files.open_file(path) as file:
        first = list(itertools.islice(_rows(file, kind), _PICTURES_WEIGHED))
        file.seek(0)
        total = sum(1 for _ in (_lines(file) if kind == "jsonl" else _rows(file, kind)))
    folder = posixpath.dirname(path)
    weights = [len(_picture(folder, row.values or {}) or b"") for row in first]
    row_bytes = sum(weights) // max(1, len(weights)) + num_bytes // max(1, total)
    stops = [min(start + CHUNK_ROWS, total) for start in range(0, total, CHUNK_ROWS)]
    return [(start, stop, (stop - start) * row_bytes) for start, stop in zip(range(0, total, CHUNK_ROWS), stops)]


def read(path: str, kind: str, start: int, stop: int | None) -> Iterator[Sample | Damage]:
    """The rows from `start` to `stop`, each with the picture it names, or none if that cannot be had."""
    folder, stem = posixpath.dirname(path), posixpath.basename(path)
    with files.open_file(path) as file:
        for number, row in enumerate(itertools.islice(_rows(file, kind), start, stop), start):
            if row.values is None:
                yield Damage("damaged_row", samples=1, num_bytes=row.num_bytes, key=f"{stem}/{number}")
                continue
            name = _picture_name(row.values)
            key = readable(name) if name else f"{stem}/{number}"
            yield Sample(key, _picture(folder, row.values), row.values)


def _picture_name(values: dict[str, Any]) -> str | bytes | None:
    return next((values[name] for name in IMAGES if isinstance(values.get(name), str | bytes)), None)


def _picture(folder: str, values: dict[str, Any]) -> bytes | None:
    name = _picture_name(values)
    if name is None:
        return None
    # As the system names files: bytes that are no UTF-8 are spelt in surrogates.
    return files.read_beside(folder, name if isinstance(name, str) else _decode(name))


def _image_column(names: Iterable[str]) -> str | None:
    names = set(names)
    return next((name for name in IMAGES if name in names), None)


def _rows(file: BinaryIO, kind: str) -> Iterator[_Row]:
    if kind == "csv":
        yield from _csv_rows(file)
        return
    for line in _lines(file):
        yield _Row(parse_object(line), len(line))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that are not blank; one that is too long is cut, and so no object."""
    for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b""):
        piece = line
        while len(piece) == _MAX_LINE_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(_MAX_LINE_BYTES)
        if line.strip():
            yield line


def _csv_rows(file: BinaryIO) -> Iterator[_Row]:
    """The rows below the header; empty ones are none, and what a row lacks or has too much is left out."""
    names = _header(file)
    reader = _reader(file)
    with contextlib.suppress(csv.Error):  # The header again. If it cannot be read, rows have no columns.
        next(reader, None)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield _Row(None)
            continue
        if cells:
            yield _Row({name: stored(cell) for name, cell in zip(names, cells, strict=False)})


def _header(file: BinaryIO) -> list[str]:
    try:
        return [readable(name.strip()) for name in next(_reader(file), [])]
    except csv.Error:
        return []


def _reader(file: BinaryIO) -> Any:
    """A csv reader of the whole `file`."""
    file.seek(0)
    delimiter = _delimiter(file.readline(_MAX_LINE_BYTES))
    file.seek(0)
    csv.field_size_limit(_MAX_LINE_BYTES)  # The default, 128 kB, is less than some captions have.
    return csv.reader(_decoded_lines(file), delimiter=delimiter)


def _decoded_lines(file: BinaryIO) -> Iterator[str]:
    for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b""):
        yield _decode(line)


def _decode(line: bytes) -> str:
    return line.decode(**ENCODING)


def _delimiter(header: bytes) -> str:
    return max(",;\t", key=lambda letter: header.count(letter.encode()))
