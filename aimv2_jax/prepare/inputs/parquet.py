"""Reader of parquet tables: img2dataset's, with the image in a column, and Hugging Face's, with {bytes, path}.

Rows are read in batches and the pages of a column one by one, so memory does not grow with the table.
"""

from __future__ import annotations

import io
import itertools
import posixpath
import struct
from collections.abc import Collection, Iterator
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.samples import MAX_SAMPLES, TABLE_CAPTIONS, BadInput, InputShard, Sample
from aimv2_jax.prepare.inputs.text_encoding import escape_name

FIELD = "a column of texts, lists of texts, numbers or truth values"
CAPTIONS = TABLE_CAPTIONS
IMAGES = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
_KEYS = ("key", "__key__", "id", "uid")
_STATUS, _FAILED = "status", "failed"  # img2dataset writes failed_to_download and failed_to_resize.
_TEXT_TYPES = ("string", "large_string", "string_view")
_BYTES_TYPES = ("binary", "large_binary", "binary_view")
_LIST_TYPES = ("list", "large_list", "fixed_size_list")
_FIELD_TYPES = ("boolean", "integer", "floating", "decimal", *_TEXT_TYPES, *_BYTES_TYPES)
_MAGIC = b"PAR1"
_TAIL = struct.Struct("<i4s")  # (size of the footer in bytes, magic).
_MAX_BATCH_ROWS, _MAX_BATCH_BYTES = 32, 1 << 30
_BUFFER_BYTES = 1 << 20


def recognises(head: bytes, path: str) -> bool:
    """Whether a file is parquet by its first bytes `head`, or by the suffix of `path` even if damaged."""
    return head.startswith(_MAGIC) or path.lower().endswith(".parquet")


def shards(path: str, num_bytes: int) -> list[InputShard] | UserError:
    """The table as one shard, or the error if it is readable and has no images, or pyarrow is missing."""
    try:
        _pyarrow()
    except UserError as error:
        return error
    schema = _schema(path, num_bytes)
    if schema is None or _image_column(schema) is not None:
        return [InputShard("parquet", path, num_bytes)]
    remedy = "Give it a column of bytes, or of {bytes, path}, with one of the names " + ", ".join(IMAGES)
    return UserError(f"parquet has no column of images ({path})", schema.names, remedy)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Columns that can be fields; None if the footer, which names them, is damaged."""
    schema = _schema(shard.path, open_files.file_size(shard.path))
    return None if schema is None else _field_columns(schema)


def read(shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | BadInput]:
    """Yields the rows in order; unreadable rows of a row group are counted from the footer.

    Rows beyond the unpacked size that is allowed for the table (`open_files.max_unpacked_bytes`) are left out.
    """
    parquet, _ = _pyarrow()
    with open_files.open_file(shard.path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            # Pages are verified if their writer has stored checksums.
            options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
            table = parquet.ParquetFile(file, **options)
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            sizes = [(group.num_rows, min(max(0, group.total_byte_size), num_bytes)) for group in groups]
            counts = [num_rows for num_rows, _ in sizes]
            if min(counts, default=0) < 0 or sum(counts) != table.metadata.num_rows or sum(counts) > MAX_SAMPLES:
                raise ValueError("inconsistent footer")
            schema = table.schema_arrow
        except _errors() as error:
            _reraise_disk_error(error)
            yield BadInput("damaged_parquet", samples=0, num_bytes=num_bytes)
            return
        image = _image_column(schema)
        if image is None:  # The file has changed since it was found.
            raise UserError(f"parquet has no column of images ({shard.path})", schema.names, "Give another table")
        columns = _Columns(schema, image, posixpath.splitext(posixpath.basename(shard.path))[0], fields)
        first, left = 0, open_files.max_unpacked_bytes(num_bytes)
        for number, (num_rows, num_group_bytes) in enumerate(sizes):
            num_given = 0
            for sample in itertools.islice(_samples(table, number, columns, first), num_rows):
                left -= _num_bytes(sample)
                if left < 0:
                    num_lost = sum(counts) - first - num_given
                    yield BadInput("decompression_bomb", num_lost, 0, columns.row_key(first + num_given))
                    return
                yield sample
                num_given += 1
            if num_given < num_rows:
                lost_bytes = num_group_bytes * (num_rows - num_given) // num_rows
                yield BadInput("damaged_parquet", num_rows - num_given, lost_bytes, columns.row_key(first + num_given))
            first += num_rows


def _samples(table: Any, group: int, columns: _Columns, first_row: int) -> Iterator[Sample]:
    """Yields the rows of a row group, up to the first batch that cannot be read."""
    try:
        num_rows = columns.batch_rows(table.metadata.row_group(group))
        for batch in table.iter_batches(num_rows, [group], columns.paths, use_threads=False):
            yield from columns.samples(batch, first_row)
            first_row += batch.num_rows
    except _errors() as error:
        _reraise_disk_error(error)


def _num_bytes(sample: Sample) -> int:
    texts = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in sample.fields.values())
    return len(sample.image or b"") + sum(len(text) for text in texts if isinstance(text, str | bytes))


class _Columns:
    """The columns to read and their conversion to samples."""

    def __init__(self, schema: Any, image: str, stem: str, fields: Collection[str] | None):
        self._image, self._stem = image, escape_name(stem)
        field_columns = _field_columns(schema)
        self._key = next((name for name in _KEYS if name in field_columns), None)
        # Other columns are not read, because they may be damaged or too wide.
        self._fields = [name for name in field_columns if fields is None or name in (*fields, self._key, _STATUS)]
        is_struct = _is(schema.field(image).type, ("struct",))
        self.paths = [f"{image}.bytes" if is_struct else image, *self._fields]

    def batch_rows(self, group: Any) -> int:
        """Number of rows of `group` to read at once: each row may hold the largest value of a dictionary."""
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
            row_fields = {name: values[row] for name, values in rows.items() if values[row] is not None}
            image, absence = _image(value), open_files.MISSING
            status = row_fields.get(_STATUS)
            if (status.decode(errors="replace") if isinstance(status, bytes) else str(status)).startswith(_FAILED):
                image = None
            if image is not None and len(image) > open_files.MAX_FILE_BYTES:
                image, absence = None, "oversized_file"
            key = row_fields.get(self._key)
            key = escape_name(key if isinstance(key, bytes) else str(key)) if key is not None else None
            yield Sample(key or self.row_key(first + row), image, row_fields, absence)


def _image(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None


def _values(column: Any) -> list[Any]:
    """Converts a column to Python values; texts that are not UTF-8 become bytes, decimals become strings."""
    _, arrow = _pyarrow()
    if _is(column.type, ("dictionary",)):
        column = column.dictionary_decode()
    if _is(column.type, ("decimal",)):
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


def _is(kind: Any, names: Collection[str]) -> bool:
    """Whether an Arrow type is one of `names`, such as "string"."""
    types = _pyarrow()[1].types
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_list(kind: Any) -> bool:
    """Whether a column holds lists of texts."""
    return _is(kind, _LIST_TYPES) and _is(kind.value_type, _TEXT_TYPES)


def _item_type(schema: Any, name: str) -> Any:
    """The type of a column's values; of its distinct values if they are stored as a dictionary."""
    kind = schema.field(name).type
    return kind.value_type if _is(kind, ("dictionary",)) else kind


def _image_column(schema: Any) -> str | None:
    """The first column of `IMAGES` that exists once and has a type that can hold images."""
    for name in IMAGES:
        if schema.names.count(name) != 1:
            continue
        kind = _item_type(schema, name)
        if _is(kind, _BYTES_TYPES):
            return name
        if _is(kind, ("struct",)) and any(part.name == "bytes" and _is(part.type, _BYTES_TYPES) for part in kind):
            return name
    return None


def _field_columns(schema: Any) -> list[str]:
    """Columns that exist once and whose values can be converted to text."""
    image = _image_column(schema)
    names = [name for name in schema.names if name != image and schema.names.count(name) == 1]
    kinds = {name: _item_type(schema, name) for name in names}
    return [name for name in names if _is(kinds[name], _FIELD_TYPES) or _is_list(kinds[name])]


def _schema(path: str, num_bytes: int) -> Any | None:
    """Columns and their types, read from the footer alone; None if it is damaged."""
    parquet, _ = _pyarrow()
    tail = open_files.read_range(path, max(0, num_bytes - _TAIL.size), _TAIL.size)
    if len(tail) < _TAIL.size:
        return None
    num_footer_bytes, magic = _TAIL.unpack(tail)
    start = num_bytes - _TAIL.size - num_footer_bytes
    if magic != _MAGIC or num_footer_bytes <= 0 or start < len(_MAGIC):
        return None
    try:
        return parquet.read_schema(io.BytesIO(_MAGIC + open_files.read_range(path, start, num_footer_bytes) + tail))
    except _errors():
        return None


def _errors() -> tuple[type[BaseException], ...]:
    """Exceptions that pyarrow raises for damaged bytes; wrong sizes also cause OSError and MemoryError."""
    _, arrow = _pyarrow()
    return (arrow.ArrowException, ValueError, OSError, MemoryError)


def _reraise_disk_error(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own OSErrors have no errno.
        raise error


def _pyarrow() -> tuple[Any, Any]:
    """(pyarrow.parquet, pyarrow), an optional dependency for parquet inputs."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "Install it: pip install aimv2_jax[parquet]"
        raise UserError("parquet needs a package that is missing", "pyarrow", remedy) from error
    return pyarrow.parquet, pyarrow
