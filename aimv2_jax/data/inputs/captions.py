"""Pairs out of a table beside its pictures: captions.jsonl or captions.csv, each row naming its picture."""

from __future__ import annotations

import codecs
import collections
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
    name = path.lower()
    if b"\0" in head and not name.endswith((".jsonl", ".csv", ".tsv")):
        return None
    first = next((line for line in head.splitlines() if line.strip()), b"")
    # A line that is longer than `head` cannot be read, but tells by its beginning.
    if name.endswith(".jsonl") or parse_object(first) is not None:
        return "jsonl"
    columns = next(csv.reader([_decode(first)], delimiter=_delimiter(first)), []) if first else []
    if name.endswith((".csv", ".tsv")) or (len(columns) > 1 and _image_column(columns) is not None):
        return "csv"
    return None


def complaint(path: str, kind: str) -> UserError | None:
    """What is wrong with the table if it is in UTF-16, or none of its first rows names a picture."""
    if files.part(path, 0, 2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return UserError("a table in UTF-16", path, "Save it in UTF-8")
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
    """The lines that are not blank."""
    return (line for line in iter(lambda: _line(file), b"") if line.strip())


def _line(file: BinaryIO) -> bytes:
    """The next line; one that is too long is cut, and so no object."""
    line = piece = file.readline(_MAX_LINE_BYTES)
    while len(piece) == _MAX_LINE_BYTES and not piece.endswith(b"\n"):
        piece = file.readline(_MAX_LINE_BYTES)
    return line


class _RowLines:
    """The lines of `file`, decoded; `row` are those since the last row, all but the first of which can be put back."""

    def __init__(self, file: BinaryIO):
        self.row: list[bytes] = []
        self._file = file
        self._waiting: collections.deque[bytes] = collections.deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else _line(self._file)
        if not line:
            raise StopIteration
        self.row.append(line)
        return _decode(line)

    def put_back(self) -> None:
        self._waiting.extendleft(reversed(self.row[1:]))


def _csv_rows(file: BinaryIO) -> Iterator[_Row]:
    """The rows below the header; empty ones are none, and what a row lacks or has too much is left out.

    A row of several lines must be without fault: a quote that nobody closed would swallow the rows below. Of a faulty
    one the first line is lost, and reading goes on below it.
    """
    names, delimiter = _header(file), _delimiter_of(file)
    lines = _RowLines(file)
    reader = csv.reader(lines, delimiter=delimiter)
    with contextlib.suppress(csv.Error):  # The header again. If it cannot be read, rows have no columns.
        next(reader, None)
    while True:
        lines.row.clear()
        cells: list[str] | None = None
        with contextlib.suppress(csv.Error):
            try:
                cells = next(reader)
            except StopIteration:
                return
        if cells is None or (len(lines.row) > 1 and not _is_one_row(lines.row, delimiter)):
            yield _Row(None, len(lines.row[0]))
            lines.put_back()
        elif cells:
            yield _Row({name: stored(cell) for name, cell in zip(names, cells, strict=False)})


def _is_one_row(lines: list[bytes], delimiter: str) -> bool:
    try:
        return sum(1 for _ in csv.reader(map(_decode, lines), delimiter=delimiter, strict=True)) == 1
    except csv.Error:
        return False


def _header(file: BinaryIO) -> list[str]:
    delimiter = _delimiter_of(file)
    try:
        return [readable(name.strip()) for name in next(csv.reader(_RowLines(file), delimiter=delimiter), [])]
    except csv.Error:
        return []


def _delimiter_of(file: BinaryIO) -> str:
    """The delimiter in the first line of `file`, which is then at its beginning."""
    csv.field_size_limit(_MAX_LINE_BYTES)  # The default, 128 kB, is less than some captions have.
    file.seek(0)
    delimiter = _delimiter(_line(file))
    file.seek(0)
    return delimiter


def _decode(line: bytes) -> str:
    return line.decode(**ENCODING)


def _delimiter(header: bytes) -> str:
    return max(",;\t", key=lambda letter: header.count(letter.encode()))
