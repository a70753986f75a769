"""Pairs out of parquet tables: img2dataset's, with the picture in a column, and Hugging Face's, with {bytes, path}.

Rows are read in batches of `_BATCH_ROWS` and the pages of a column one by one, so that memory does not grow with the
table or its row groups.
"""

from __future__ import annotations

import io
import itertools
import posixpath
import struct
from collections.abc import Iterator
from typing import Any

from aimv2_jax.data.inputs import files
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.data.inputs.texts import readable
from aimv2_jax.errors import UserError

FIELD = "a column of texts, lists of texts, numbers or truth values"
CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")
IMAGES = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
_KEYS = ("key", "__key__", "id", "uid")
_FAILED = "failed"  # What img2dataset writes: failed_to_download, failed_to_resize.
_MAGIC = b"PAR1"
_TAIL = struct.Struct("<i4s")  # Bytes of the footer, and the magic.
_BATCH_ROWS = 32
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


def fields(shard: InputShard) -> list[str] | None:
    """The columns that can be fields; None if the footer, which names them, is damaged."""
    schema = _schema(shard.path, files.size(shard.path))
    return None if schema is None else _field_columns(schema)


def read(shard: InputShard) -> Iterator[Sample | Damage]:
    """The rows in their order; those of a row group that cannot be read are counted as the footer counts them."""
    parquet, _ = _pyarrow()
    with files.open_file(shard.path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            # Pages are checked where their writer left checksums.
            options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
            table = parquet.ParquetFile(file, **options)
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            sizes = [(group.num_rows, max(0, group.total_byte_size)) for group in groups]
            counts = [num_rows for num_rows, _ in sizes]
            if min(counts, default=0) < 0 or sum(counts) != table.metadata.num_rows:
                raise ValueError("a footer that contradicts itself")
            schema = table.schema_arrow
        except _errors() as error:
            _pass_on_what_the_disk_refuses(error)
            yield Damage("damaged_parquet", samples=0, num_bytes=num_bytes)
            return
        image = _image_column(schema)
        if image is None:  # It was another when it was found.
            raise UserError(f"parquet has no column of pictures ({shard.path})", schema.names, "Give another table")
        columns = _Columns(schema, image, posixpath.splitext(posixpath.basename(shard.path))[0])
        first = 0
        for number, (num_rows, num_group_bytes) in enumerate(sizes):
            num_given = 0
            for sample in itertools.islice(_samples(table, number, columns, first), num_rows):
                yield sample
                num_given += 1
            if num_given < num_rows:
                lost_bytes = num_group_bytes * (num_rows - num_given) // num_rows
                yield Damage("damaged_parquet", num_rows - num_given, lost_bytes, columns.row_key(first + num_given))
            first += num_rows


def _samples(table: Any, group: int, columns: _Columns, first_row: int) -> Iterator[Sample]:
    """The rows of a row group, up to the first batch that cannot be read."""
    try:
        for batch in table.iter_batches(_BATCH_ROWS, [group], columns.names, use_threads=False):
            yield from columns.samples(batch, first_row)
            first_row += batch.num_rows
    except _errors() as error:
        _pass_on_what_the_disk_refuses(error)


class _Columns:
    """Which columns are read, and how a row of them becomes a sample."""

    def __init__(self, schema: Any, image: str, stem: str):
        self._image, self._stem = image, readable(stem)
        self._fields = _field_columns(schema)
        self._key = next((name for name in _KEYS if name in self._fields), None)
        self.names = [image, *self._fields]

    def row_key(self, row: int) -> str:
        return f"{self._stem}/{row}"

    def samples(self, batch: Any, first: int) -> list[Sample]:
        images = [_image(value) for value in _values(batch.column(self._image))]
        rows = {name: _values(batch.column(name)) for name in self._fields}
        samples = []
        for row, image in enumerate(images):
            found = {name: values[row] for name, values in rows.items() if values[row] is not None}
            status = found.get("status")
            if (status.decode(errors="replace") if isinstance(status, bytes) else str(status)).startswith(_FAILED):
                image = None
            key = found.get(self._key)
            key = readable(key if isinstance(key, bytes) else str(key)) if key is not None else None
            samples.append(Sample(key or self.row_key(first + row), image, found))
        return samples


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
    if _is_text(column.type):
        column = column.cast(arrow.large_binary() if arrow.types.is_large_string(column.type) else arrow.binary())
        return [_text(value) for value in column.to_pylist()]
    if _is_list(column.type):
        lists = column.cast(arrow.large_list(arrow.large_binary())).to_pylist()
        return [texts and [_text(value) for value in texts] for texts in lists]
    return column.to_pylist()


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
