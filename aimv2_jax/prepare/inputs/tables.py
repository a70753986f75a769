"""Reader of .jsonl and .csv tables beside image files; each row names its image."""

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

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.samples import TABLE_CAPTIONS, BadInput, InputShard, MapFile, Sample
from aimv2_jax.prepare.inputs.text_encoding import ENCODING, escape_name, parse_object, text_or_bytes

IMAGES = ("file_name", "image", "path", "filename", "filepath")
CHUNK_ROWS = 10_000
_MAX_LINE_BYTES = 16 << 20
_MAX_ROW_LINES = 1000  # Lines of one csv row; a longer row has an unbalanced quote.
_HEADER_BYTES = 1 << 20
_MAX_ROWS_PROBED = 1000
_IMAGES_MEASURED = 32


class _Line(NamedTuple):
    text: bytes | None  # None if the line is too long to be read.
    num_bytes: int


class _Row(NamedTuple):
    """An unparsed row; `content` is None if it cannot be read."""

    content: Any
    num_bytes: int  # Includes the blank lines before it.


class JsonLines:
    """Rows of the .jsonl at `path`: one JSON object per line."""

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
    """Rows of the .csv at `path` below its header; they begin at byte `start`."""

    name, suffixes, field = "csv", (".csv", ".tsv"), "a column"

    def __init__(self, path: str):
        head = open_files.read_range(path, 0, _HEADER_BYTES)
        self._delimiter = _delimiter(_first_line(head))
        header = next(self.rows(_lines(io.BytesIO(head))), _Row(None, 0))
        self._names = [escape_name(name.strip()) for name in header.content or []]
        self.start = header.num_bytes

    @staticmethod
    def is_begun_by(head: bytes) -> bool:
        first = _first_line(head)
        columns = next(csv.reader([_decode(first)], delimiter=_delimiter(first)), [])
        return len(columns) > 1 and _image_column(columns) is not None

    def rows(self, lines: Iterator[_Line]) -> Iterator[_Row]:
        """Yields rows of one or more lines; an unbalanced quote costs only its line."""
        csv.field_size_limit(_MAX_LINE_BYTES)  # Some captions exceed the default of 128 kB.
        pushed_back = deque[_Line]()  # Lines that a failed row has consumed.
        num_blank_bytes = 0
        while True:
            consumed: list[_Line] = []

            def next_lines(consumed: list[_Line] = consumed) -> Iterator[str]:
                while len(consumed) < _MAX_ROW_LINES and (
                    line := pushed_back.popleft() if pushed_back else next(lines, None)
                ):
                    consumed.append(line)
                    yield self._text(line)

            try:
                content = next(csv.reader(next_lines(), delimiter=self._delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error:
                pushed_back.extendleft(reversed(consumed[1:]))
                del consumed[1:]
                content = self._parse_line(consumed[0])
            num_bytes = sum(line.num_bytes for line in consumed)
            if content is not None and not any(cell.strip() for cell in content):
                num_blank_bytes += num_bytes
                continue
            yield _Row(content, num_blank_bytes + num_bytes)
            num_blank_bytes = 0

    def values(self, content: list[str]) -> dict[str, Any]:
        """Maps column names to cells; missing and surplus cells are left out."""
        return {name: text_or_bytes(cell) for name, cell in zip(self._names, content, strict=False)}

    def _parse_line(self, line: _Line) -> list[str] | None:
        """Parses one `line` as a row with lenient quotes; None if it is not a whole row."""

        def single_line() -> Iterator[str]:
            yield self._text(line)
            raise csv.Error("a quote is not closed")

        try:
            return next(csv.reader(single_line(), delimiter=self._delimiter))
        except csv.Error:
            return None

    @staticmethod
    def _text(line: _Line) -> str:
        if line.text is None:
            raise csv.Error("a line is too long")
        return _decode(line.text)


class Table:
    """Input format of tables in the layout `JsonLines` or `Csv`."""

    CAPTIONS = TABLE_CAPTIONS

    def __init__(self, layout: type[JsonLines] | type[Csv]):
        self._layout = layout
        self.FIELD = layout.field

    def recognises(self, head: bytes, path: str) -> bool:
        named = path.lower().endswith(self._layout.suffixes)
        return named or (b"\0" not in head and self._layout.is_begun_by(head))

    def shards(self, path: str, num_bytes: int) -> list[InputShard] | UserError:
        """Shards of `CHUNK_ROWS` rows each, or the error if the table is in UTF-16 or its rows name no images."""
        head = open_files.read_range(path, 0, _HEADER_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return UserError("a table in UTF-16", path, "Save it in UTF-8")
        if b"\r" in head and b"\n" not in head:
            return UserError("a table whose lines end in CR alone", path, "Save it with lines that end in LF or CR LF")
        columns = self.fields(InputShard(self._layout.name, path, num_bytes))
        if columns is not None and _image_column(columns) is None:
            remedy = "Give it one of the columns " + ", ".join(IMAGES)
            return UserError(f"table has no column of image names ({path})", columns, remedy)
        layout, shards = self._layout(path), list[InputShard]()
        with open_files.open_file(path) as file:
            file.seek(layout.start)
            image_bytes = _mean_image_bytes(path, layout, file)
            start = file.seek(layout.start)
            sizes = (row.num_bytes for row in layout.rows(_lines(file)))
            while chunk := list(itertools.islice(sizes, CHUNK_ROWS)):
                weight = sum(chunk) + len(chunk) * image_bytes
                first_row = len(shards) * CHUNK_ROWS
                shards.append(InputShard(layout.name, path, weight, start, start + sum(chunk), first_row))
                start += sum(chunk)
        return shards

    def fields(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """Fields of the first rows, and `wanted` fields of any row; None if no row can be read."""
        found: dict[str, None] = {}
        for number, (values, _) in enumerate(self._rows(shard)):
            if number >= _MAX_ROWS_PROBED and found.keys() >= set(wanted):
                break
            found |= dict.fromkeys(values or {})
        return list(found) or None

    def maps(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """Any field may name a second image as `IMAGES` name the image."""
        return self.fields(shard, wanted)

    def classes(self, shard: InputShard) -> dict[str, tuple[str, ...]]:
        """Tables declare no classes."""
        return {}

    def read(
        self, shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
    ) -> Iterator[Sample | BadInput]:
        """Yields each row with all its fields and the images that it names, or none if they cannot be read."""
        folder, stem = posixpath.dirname(shard.path), escape_name(posixpath.basename(shard.path))
        for number, (values, num_bytes) in enumerate(self._rows(shard), shard.first_row):
            if values is None:
                yield BadInput("damaged_row", samples=1, num_bytes=num_bytes, key=f"{stem}/{number}")
                continue
            name = _image_name(values)
            key = escape_name(name) if name else f"{stem}/{number}"
            data, absence = open_files.read_or_reason(folder, name, shard.follow_links)
            names = {field: _text(values.get(field)) for field in maps}
            files = {
                field: MapFile(*open_files.read_or_reason(folder, name, shard.follow_links))
                for field, name in names.items()
                if name
            }
            yield Sample(key, data, values, absence, files)

    def _rows(self, shard: InputShard) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Yields (values, size in bytes) of each row; values is None for a row that cannot be read."""
        layout = self._layout(shard.path)
        start = max(shard.start, layout.start)
        with open_files.open_file(shard.path, start, shard.stop) as file:
            for content, num_bytes in layout.rows(_lines(file, shard.stop)):
                yield None if content is None else layout.values(content), num_bytes


def _mean_image_bytes(path: str, layout: JsonLines | Csv, file: BinaryIO) -> int:
    """Mean image size in bytes, measured on the first rows."""
    rows = itertools.islice(layout.rows(_lines(file)), _IMAGES_MEASURED)
    values = [(layout.values(row.content) if row.content is not None else None) or {} for row in rows]
    sizes = [open_files.size_beside(posixpath.dirname(path), _image_name(value)) for value in values]
    return sum(sizes) // max(1, len(sizes))


def _image_name(values: dict[str, Any]) -> str:
    """Image file name as the system stores it, with non-UTF-8 bytes as surrogates; "" if there is none."""
    return _text(next((values[name] for name in IMAGES if isinstance(values.get(name), str | bytes)), ""))


def _text(name: Any) -> str:
    """A file name in a cell as the system stores it, with non-UTF-8 bytes as surrogates; "" if there is none."""
    if isinstance(name, bytes):
        return _decode(name)
    return name if isinstance(name, str) else ""


def _image_column(names: Iterable[str]) -> str | None:
    names = set(names)
    return next((name for name in IMAGES if name in names), None)


def _lines(file: BinaryIO, stop: int | None = None) -> Iterator[_Line]:
    """Yields the lines from the current position of `file` up to byte `stop` or the end."""
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
