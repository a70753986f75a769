"""Pairs out of parquet tables: img2dataset's, with the picture in a column, and Hugging Face's, with {bytes, path}.

Rows are read some at a time, and the pages of a column one by one, so that memory does not grow with the table.
"""

from __future__ import annotations

import io
import itertools
import posixpath
import struct
from collections.abc import Collection, Iterator
from typing import Any

from aimv2_jax.data.inputs import files
from aimv2_jax.data.inputs.samples import MAX_SAMPLES, Damage, InputShard, Sample
from aimv2_jax.data.inputs.texts import readable
from aimv2_jax.errors import UserError

FIELD = "a column of texts, lists of texts, numbers or truth values"
CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")
IMAGES = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
_KEYS = ("key", "__key__", "id", "uid")
_STATUS, _FAILED = "status", "failed"  # What img2dataset writes: failed_to_download, failed_to_resize.
_MAGIC = b"PAR1"
_TAIL = struct.Struct("<i4s")  # Bytes of the footer, and the magic.
_MAX_BATCH_ROWS, _MAX_BATCH_BYTES = 32, 1 << 30
_BUFFER_BYTES = 1 << 20


def recognises(head: bytes, path: str) -> bool:
    """Whether `head` begins a parquet file, or `path` calls itself one, whatever became of it."""
    return head.startswith(_MAGIC) or path.lower().endswith(".parquet")


def shards(path: str, num_bytes: int) -> list[InputShard] | UserError:
    """The one that the table is; or what is wrong if it is readable and holds no pictures, or pyarrow is missing."""
    try:
        _pyarrow()
    except UserError as error:
        return error
    schema = _schema(path, num_bytes)
    if schema is None or _image_column(schema) is not None:
        return [InputShard("parquet", path, num_bytes)]
    wanted = "It was looked for a column of bytes, or of {bytes, path}, named " + ", ".join(IMAGES)
    return UserError(f"parquet has no column of pictures ({path})", schema.names, wanted)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """The columns that can be fields; None if the footer, which names them, is damaged."""
    schema = _schema(shard.path, files.size(shard.path))
    return None if schema is None else _field_columns(schema)


def read(shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | Damage]:
    """The rows in their order; those of a row group that cannot be read are counted as the footer counts them.

    Rows beyond what a table of this size may unpack to (`files.max_unpacked`) are left out.
    """
    parquet, _ = _pyarrow()
    with files.open_file(shard.path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            # Pages are checked where their writer left checksums.
            options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
            table = parquet.ParquetFile(file, **options)
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            sizes = [(group.num_rows, min(max(0, group.total_byte_size), num_bytes)) for group in groups]
            counts = [num_rows for num_rows, _ in sizes]
            if min(counts, default=0) < 0 or sum(counts) != table.metadata.num_rows or sum(counts) > MAX_SAMPLES:
                raise ValueError("a footer that cannot be true")
            schema = table.schema_arrow
        except _errors() as error:
            _pass_on_what_the_disk_refuses(error)
            yield Damage("damaged_parquet", samples=0, num_bytes=num_bytes)
            return
        image = _image_column(schema)
        if image is None:  # It was another when it was found.
            raise UserError(f"parquet has no column of pictures ({shard.path})", schema.names, "Give another table")
        columns = _Columns(schema, image, posixpath.splitext(posixpath.basename(shard.path))[0], fields)
        first, left = 0, files.max_unpacked(num_bytes)
        for number, (num_rows, num_group_bytes) in enumerate(sizes):
            num_given = 0
            for sample in itertools.islice(_samples(table, number, columns, first), num_rows):
                left -= _num_bytes(sample)
                if left < 0:
                    num_lost = sum(counts) - first - num_given
                    yield Damage("decompression_bomb", num_lost, 0, columns.row_key(first + num_given))
                    return
                yield sample
                num_given += 1
            if num_given < num_rows:
                lost_bytes = num_group_bytes * (num_rows - num_given) // num_rows
                yield Damage("damaged_parquet", num_rows - num_given, lost_bytes, columns.row_key(first + num_given))
            first += num_rows


def _samples(table: Any, group: int, columns: _Columns, first_row: int) -> Iterator[Sample]:
    """The rows of a row group, up to the first batch that cannot be read."""
    try:
        num_rows = columns.batch_rows(table.metadata.row_group(group))
        for batch in table.iter_batches(num_rows, [group], columns.paths, use_threads=False):
            yield from columns.samples(batch, first_row)
            first_row += batch.num_rows
    except _errors() as error:
        _pass_on_what_the_disk_refuses(error)


def _num_bytes(sample: Sample) -> int:
    texts = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in sample.fields.values())
    return len(sample.image or b"") + sum(len(text) for text in texts if isinstance(text, str | bytes))


class _Columns:
    """Which columns are read, and how a row of them becomes a sample."""

    def __init__(self, schema: Any, image: str, stem: str, fields: Collection[str] | None):
        self._image, self._stem = image, readable(stem)
        there = _field_columns(schema)
        self._key = next((name for name in _KEYS if name in there), None)
        # A column that nobody asks for may be damaged, or too wide to be read.
        self._fields = [name for name in there if fields is None or name in (*fields, self._key, _STATUS)]
        _, arrow = _pyarrow()
        is_struct = arrow.types.is_struct(schema.field(image).type)
        self.paths = [f"{image}.bytes" if is_struct else image, *self._fields]

    def batch_rows(self, group: Any) -> int:
        """How many rows of `group` are read at once: each may hold the largest value of a dictionary."""
        chunks = [group.column(number) for number in range(group.num_columns)]
        wanted = tuple(f"{path}." for path in self.paths)  # A column of lists is stored as NAME.list.element.
        sizes = [chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(wanted)]
        return min(max(_MAX_BATCH_BYTES // max([1, *sizes]), 1), _MAX_BATCH_ROWS)

    def row_key(self, row: int) -> str:
        return f"{self._stem}/{row}"

    def samples(self, batch: Any, first: int) -> Iterator[Sample]:
        images = _values(batch.column(self._image))
        rows = {name: _values(batch.column(name)) for name in self._fields}
        for row, value in enumerate(images):
            found = {name: values[row] for name, values in rows.items() if values[row] is not None}
            image, absence = _image(value), files.MISSING
            status = found.get(_STATUS)
            if (status.decode(errors="replace") if isinstance(status, bytes) else str(status)).startswith(_FAILED):
                image = None
            if image is not None and len(image) > files.MAX_FILE_BYTES:
                image, absence = None, "oversized_file"
            key = found.get(self._key)
            key = readable(key if isinstance(key, bytes) else str(key)) if key is not None else None
            yield Sample(key or self.row_key(first + row), image, found, absence)


def _image(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None


def _values(column: Any) -> list[Any]:
    """The column as Python's own; texts that are not UTF-8 as bytes, decimals as they are written."""
    _, arrow = _pyarrow()
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_decimal(column.type):
        column = column.cast(arrow.string())
    if _is_list(column.type):
        lists = column.cast(arrow.large_list(arrow.large_binary())).to_pylist()
        return [texts and [_text(value) for value in texts] for texts in lists]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        column = column.cast(arrow.large_binary() if arrow.types.is_large_string(column.type) else arrow.binary())
        return [_text(value) for value in column.to_pylist()]


def _text(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _is_text(kind: Any) -> bool:
    _, arrow = _pyarrow()
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    """Whether a column is of lists of texts."""
    _, arrow = _pyarrow()
    tests = (arrow.types.is_list, arrow.types.is_large_list, arrow.types.is_fixed_size_list)
    return any(test(kind) for test in tests) and _is_text(kind.value_type)


def _is_bytes(kind: Any) -> bool:
    _, arrow = _pyarrow()
    tests = (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_binary_view)
    return any(test(kind) for test in tests)


def _image_column(schema: Any) -> str | None:
    """The column of pictures: by the names of `IMAGES` in their order, and of a type that can hold them."""
    _, arrow = _pyarrow()
    for name in IMAGES:
        if schema.names.count(name) != 1:
            continue
        kind = schema.field(name).type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if _is_bytes(kind):
            return name
        if arrow.types.is_struct(kind) and any(f.name == "bytes" and _is_bytes(f.type) for f in kind):
            return name
    return None


def _field_columns(schema: Any) -> list[str]:
    """The columns that a text can be made of."""
    _, arrow = _pyarrow()
    numbers = (arrow.types.is_boolean, arrow.types.is_integer, arrow.types.is_floating, arrow.types.is_decimal)

    def is_field(kind: Any) -> bool:
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        return any(test(kind) for test in (*numbers, _is_text, _is_bytes, _is_list))

    image = _image_column(schema)
    names = [field.name for field in schema if field.name != image and is_field(field.type)]
    return [name for name in names if schema.names.count(name) == 1]


def _schema(path: str, num_bytes: int) -> Any | None:
    """The columns and their types, out of the footer alone; None if it is damaged."""
    parquet, _ = _pyarrow()
    tail = files.part(path, max(0, num_bytes - _TAIL.size), _TAIL.size)
    if len(tail) < _TAIL.size:
        return None
    num_footer_bytes, magic = _TAIL.unpack(tail)
    start = num_bytes - _TAIL.size - num_footer_bytes
    if magic != _MAGIC or num_footer_bytes <= 0 or start < len(_MAGIC):
        return None
    try:
        return parquet.read_schema(io.BytesIO(_MAGIC + files.part(path, start, num_footer_bytes) + tail))
    except _errors():
        return None


def _errors() -> tuple[type[BaseException], ...]:
    """What pyarrow raises over damaged bytes: OSError and MemoryError too, for sizes that they claim."""
    _, arrow = _pyarrow()
    return (arrow.ArrowException, ValueError, OSError, MemoryError)


def _pass_on_what_the_disk_refuses(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own have no number.
        raise error


def _pyarrow() -> tuple[Any, Any]:
    """(pyarrow.parquet, pyarrow), which only those need who have parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "Install it: pip install aimv2_jax[parquet]"
        raise UserError("parquet needs a package that is missing", "pyarrow", remedy) from error
    return pyarrow.parquet, pyarrow
