"""Pairs out of a table beside its pictures: captions.jsonl or captions.csv, each row naming its picture."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import posixpath
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from aimv2_jax.data.inputs import files
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.data.inputs.texts import ENCODING, parse_object, readable, stored
from aimv2_jax.errors import UserError

IMAGES = ("file_name", "image", "path", "filename", "filepath")
CHUNK_ROWS = 10_000
_MAX_LINE_BYTES = 16 << 20
_MAX_ROW_LINES = 1000  # Of a csv. No caption has so many: the quote that holds them together is a slip.
_HEADER_BYTES = 1 << 20
_ROWS_ASKED = 1000
_PICTURES_WEIGHED = 32


class _Line(NamedTuple):
    text: bytes | None  # None: too long to be read.
    num_bytes: int


class _Row(NamedTuple):
    """A row, split but not parsed; `content` is None if it cannot be read."""

    content: Any
    num_bytes: int  # With the blank lines before it.


class JsonLines:
    """The rows of the .jsonl at `path`: lines, each a JSON object."""

    name, suffixes, field = "jsonl", (".jsonl",), "a key"
    start = 0

    def __init__(self, path: str):
        pass

    @staticmethod
    def is_begun_by(head: bytes) -> bool:
        return _image_column(parse_object(_first_line(head)) or ()) is not None

    def rows(self, lines: Iterator[_Line]) -> Iterator[_Row]:
        num_blank_bytes = 0
        for text, num_bytes in lines:
            if text is not None and not text.strip():
                num_blank_bytes += num_bytes
                continue
            yield _Row(text, num_blank_bytes + num_bytes)
            num_blank_bytes = 0

    def values(self, content: bytes) -> dict[str, Any] | None:
        return parse_object(content)


class Csv:
    """The rows of the .csv at `path` below its header, which begin at byte `start`."""

    name, suffixes, field = "csv", (".csv", ".tsv"), "a column"

    def __init__(self, path: str):
        head = files.part(path, 0, _HEADER_BYTES)
        self._delimiter = _delimiter(_first_line(head))
        header = next(self.rows(_lines(io.BytesIO(head))), _Row(None, 0))
        self._names = [readable(name.strip()) for name in header.content or []]
        self.start = header.num_bytes

    @staticmethod
    def is_begun_by(head: bytes) -> bool:
        first = _first_line(head)
        columns = next(csv.reader([_decode(first)], delimiter=_delimiter(first)), [])
        return len(columns) > 1 and _image_column(columns) is not None

    def rows(self, lines: Iterator[_Line]) -> Iterator[_Row]:
        """A row may have several lines; but a quote that is not closed in order costs the line it stands in only."""
        csv.field_size_limit(_MAX_LINE_BYTES)  # The default, 128 kB, is less than some captions have.
        again = deque[_Line]()  # Lines that a row has taken in vain.
        num_blank_bytes = 0
        while True:
            taken: list[_Line] = []

            def following(taken: list[_Line] = taken) -> Iterator[str]:
                while len(taken) < _MAX_ROW_LINES and (line := again.popleft() if again else next(lines, None)):
                    taken.append(line)
                    yield self._text(line)

            try:
                content = next(csv.reader(following(), delimiter=self._delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error:
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
                content = self._alone(taken[0])
            num_bytes = sum(line.num_bytes for line in taken)
            if content is not None and not any(cell.strip() for cell in content):
                num_blank_bytes += num_bytes
                continue
            yield _Row(content, num_blank_bytes + num_bytes)
            num_blank_bytes = 0

    def values(self, content: list[str]) -> dict[str, Any]:
        """What a row lacks or has too much is left out."""
        return {name: stored(cell) for name, cell in zip(self._names, content, strict=False)}

    def _alone(self, line: _Line) -> list[str] | None:
        """The row of one `line`, quotes as they come; None if it is not a whole row."""

        def only() -> Iterator[str]:
            yield self._text(line)
            raise csv.Error("a quote is not closed")

        try:
            return next(csv.reader(only(), delimiter=self._delimiter))
        except csv.Error:
            return None

    @staticmethod
    def _text(line: _Line) -> str:
        if line.text is None:
            raise csv.Error("a line is too long")
        return _decode(line.text)


class Table:
    """The kind of input that is laid out as `JsonLines` or `Csv`."""

    CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")

    def __init__(self, layout: type[JsonLines] | type[Csv]):
        self._layout = layout
        self.FIELD = layout.field

    def recognises(self, head: bytes, path: str) -> bool:
        named = path.lower().endswith(self._layout.suffixes)
        return named or (b"\0" not in head and self._layout.is_begun_by(head))

    def shards(self, path: str, num_bytes: int) -> list[InputShard] | UserError:
        """Each of `CHUNK_ROWS` rows; or what is wrong if the table is in UTF-16, or no row names a picture."""
        head = files.part(path, 0, _HEADER_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return UserError("a table in UTF-16", path, "Save it in UTF-8")
        if b"\r" in head and b"\n" not in head:
            return UserError("a table whose lines end in CR alone", path, "Save it with lines that end in LF or CR LF")
        found = self.fields(InputShard(self._layout.name, path, num_bytes))
        if found is not None and _image_column(found) is None:
            return UserError(f"table names no pictures ({path})", found, "It was looked for " + ", ".join(IMAGES))
        layout, shards = self._layout(path), list[InputShard]()
        with files.open_file(path) as file:
            file.seek(layout.start)
            picture_bytes = _picture_bytes(path, layout, file)
            start = file.seek(layout.start)
            sizes = (row.num_bytes for row in layout.rows(_lines(file)))
            while chunk := list(itertools.islice(sizes, CHUNK_ROWS)):
                weight = sum(chunk) + len(chunk) * picture_bytes
                first_row = len(shards) * CHUNK_ROWS
                shards.append(InputShard(layout.name, path, weight, start, start + sum(chunk), first_row))
                start += sum(chunk)
        return shards

    def fields(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """What the first rows have, and of what is `wanted` all that others have, too; None if no row can be read."""
        found: dict[str, None] = {}
        for number, (values, _) in enumerate(self._rows(shard)):
            if number >= _ROWS_ASKED and found.keys() >= set(wanted):
                break
            found |= dict.fromkeys(values or {})
        return list(found) or None

    def read(self, shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | Damage]:
        """Each row, with all its fields and the picture it names, or none if that cannot be had."""
        folder, stem = posixpath.dirname(shard.path), readable(posixpath.basename(shard.path))
        for number, (values, num_bytes) in enumerate(self._rows(shard), shard.first_row):
            if values is None:
                yield Damage("damaged_row", samples=1, num_bytes=num_bytes, key=f"{stem}/{number}")
                continue
            name = _picture_name(values)
            key = readable(name) if name else f"{stem}/{number}"
            try:
                yield Sample(key, files.read_beside(folder, name, shard.follow_links), values)
            except files.NoFile as error:
                yield Sample(key, None, values, error.reason)

    def _rows(self, shard: InputShard) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """(values, or None if they cannot be read; bytes) of each row."""
        layout = self._layout(shard.path)
        start = max(shard.start, layout.start)
        with files.open_file(shard.path, start, shard.stop) as file:
            for content, num_bytes in layout.rows(_lines(file, shard.stop)):
                yield None if content is None else layout.values(content), num_bytes


def _picture_bytes(path: str, layout: JsonLines | Csv, file: BinaryIO) -> int:
    """How large a picture is, by those of the first rows."""
    rows = itertools.islice(layout.rows(_lines(file)), _PICTURES_WEIGHED)
    values = [(layout.values(row.content) if row.content is not None else None) or {} for row in rows]
    sizes = [files.size_beside(posixpath.dirname(path), _picture_name(value)) for value in values]
    return sum(sizes) // max(1, len(sizes))


def _picture_name(values: dict[str, Any]) -> str:
    """The file's name as the system has it, with bytes that are no UTF-8 in surrogates; "" if there is none."""
    name = next((values[name] for name in IMAGES if isinstance(values.get(name), str | bytes)), "")
    return name if isinstance(name, str) else _decode(name)


def _image_column(names: Iterable[str]) -> str | None:
    names = set(names)
    return next((name for name in IMAGES if name in names), None)


def _lines(file: BinaryIO, stop: int | None = None) -> Iterator[_Line]:
    """The lines from where `file` stands, up to byte `stop` or the end."""
    left = sys.maxsize if stop is None else stop - file.tell()
    while piece := file.readline(min(left, _MAX_LINE_BYTES)):
        text, num_bytes = piece, len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(min(left - num_bytes, _MAX_LINE_BYTES))):
            text, num_bytes = None, num_bytes + len(piece)
        left -= num_bytes
        yield _Line(text, num_bytes)


def _first_line(head: bytes) -> bytes:
    return next((line for line in head.splitlines() if line.strip()), b"")


def _delimiter(header: bytes) -> str:
    return max(",;\t", key=lambda letter: header.count(letter.encode()))


def _decode(line: bytes) -> str:
    return line.decode(**ENCODING)
