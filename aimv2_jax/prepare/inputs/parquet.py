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
from aimv2_jax.prepare.inputs import arrow_columns, open_files
from aimv2_jax.prepare.inputs.arrow_columns import Columns, errors, import_pyarrow, reraise_disk_error
from aimv2_jax.prepare.inputs.samples import MAX_SAMPLES, TABLE_CAPTIONS, BadInput, InputShard, Sample

FIELD = arrow_columns.FIELD
CAPTIONS = TABLE_CAPTIONS
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
        import_pyarrow()
    except UserError as error:
        return error
    schema = _schema(path, num_bytes)
    if schema is None or arrow_columns.image_column(schema) is not None:
        return [InputShard("parquet", path, num_bytes)]
    return arrow_columns.no_images(path, schema)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Columns that can be fields; None if the footer, which names them, is damaged."""
    schema = _schema_of(shard)
    return None if schema is None else arrow_columns.field_columns(schema)


def maps(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Columns that can hold second images; None if the footer is damaged."""
    schema = _schema_of(shard)
    return None if schema is None else arrow_columns.map_columns(schema)


def classes(shard: InputShard) -> dict[str, tuple[str, ...]]:
    """Columns of class numbers, with the names of the classes in the order of their numbers."""
    schema = _schema_of(shard)
    return {} if schema is None else arrow_columns.class_names(schema)


def read(
    shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
) -> Iterator[Sample | BadInput]:
    """Yields the rows in order; unreadable rows of a row group are counted from the footer.

    Rows beyond the unpacked size that is allowed for the table (`open_files.max_unpacked_bytes`) are left out.
    """
    parquet = import_pyarrow().parquet
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
        except errors() as error:
            reraise_disk_error(error)
            yield BadInput("damaged_parquet", samples=0, num_bytes=num_bytes)
            return
        if arrow_columns.image_column(schema) is None:  # The file has changed since it was found.
            raise arrow_columns.no_images(shard.path, schema)
        columns = Columns(schema, posixpath.splitext(posixpath.basename(shard.path))[0], fields, maps)
        first, left = 0, open_files.max_unpacked_bytes(num_bytes)
        for number, (num_rows, num_group_bytes) in enumerate(sizes):
            num_given = 0
            for sample in itertools.islice(_samples(table, number, columns, first), num_rows):
                left -= arrow_columns.num_bytes(sample)
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


def _samples(table: Any, group: int, columns: Columns, first_row: int) -> Iterator[Sample]:
    """Yields the rows of a row group, up to the first batch that cannot be read."""
    try:
        num_rows = _batch_rows(table.metadata.row_group(group), columns.paths)
        for batch in table.iter_batches(num_rows, [group], columns.paths, use_threads=False):
            yield from columns.samples(batch, first_row)
            first_row += batch.num_rows
    except errors() as error:
        reraise_disk_error(error)


def _batch_rows(group: Any, paths: Collection[str]) -> int:
    """Number of rows of `group` to read at once: each row may hold the largest value of a dictionary."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    wanted = tuple(f"{path}." for path in paths)  # A column of lists is stored as NAME.list.element.
    sizes = [chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(wanted)]
    return min(max(_MAX_BATCH_BYTES // max([1, *sizes]), 1), _MAX_BATCH_ROWS)


def _schema_of(shard: InputShard) -> Any | None:
    return _schema(shard.path, open_files.file_size(shard.path))


def _schema(path: str, num_bytes: int) -> Any | None:
    """Columns and their types, read from the footer alone; None if it is damaged."""
    parquet = import_pyarrow().parquet
    tail = open_files.read_range(path, max(0, num_bytes - _TAIL.size), _TAIL.size)
    if len(tail) < _TAIL.size:
        return None
    num_footer_bytes, magic = _TAIL.unpack(tail)
    start = num_bytes - _TAIL.size - num_footer_bytes
    if magic != _MAGIC or num_footer_bytes <= 0 or start < len(_MAGIC):
        return None
    try:
        return parquet.read_schema(io.BytesIO(_MAGIC + open_files.read_range(path, start, num_footer_bytes) + tail))
    except errors():
        return None
