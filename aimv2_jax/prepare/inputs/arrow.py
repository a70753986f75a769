"""Reader of Arrow streams, the files of `Dataset.save_to_disk` of Hugging Face's datasets and of its cache."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Collection, Iterator
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import arrow_columns, open_files
from aimv2_jax.prepare.inputs.arrow_columns import Columns, errors, import_pyarrow, reraise_disk_error
from aimv2_jax.prepare.inputs.samples import MAX_SAMPLES, TABLE_CAPTIONS, BadInput, InputShard, Sample

FIELD = arrow_columns.FIELD
CAPTIONS = TABLE_CAPTIONS
SUFFIX = ".arrow"
_CONTINUATION = b"\xff\xff\xff\xff"  # Precedes the size of each message.
_HEAD_BYTES = 8 << 20  # The schema is the first message; the names of 100,000 classes take less.
_SLICE_ROWS = 32


def recognises(head: bytes, path: str) -> bool:
    """Whether a file is an Arrow stream by its first bytes `head`, or by the suffix of `path` even if damaged."""
    return head.startswith(_CONTINUATION) or path.lower().endswith(SUFFIX)


def shards(path: str, num_bytes: int) -> list[InputShard] | UserError:
    """The file as one shard, or the error if it is readable and has no images, or pyarrow is missing."""
    try:
        import_pyarrow()
    except UserError as error:
        return error
    schema = _schema(path)
    if schema is None or arrow_columns.image_column(schema) is not None:
        return [InputShard("arrow", path, num_bytes)]
    return arrow_columns.no_images(path, schema)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Columns that can be fields; None if the schema is damaged."""
    schema = _schema(shard.path)
    return None if schema is None else arrow_columns.field_columns(schema)


def maps(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Columns that can hold second images; None if the schema is damaged."""
    schema = _schema(shard.path)
    return None if schema is None else arrow_columns.map_columns(schema)


def classes(shard: InputShard) -> dict[str, tuple[str, ...]]:
    """Columns of class numbers, with the names of the classes in the order of their numbers."""
    schema = _schema(shard.path)
    return {} if schema is None else arrow_columns.class_names(schema)


def read(
    shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
) -> Iterator[Sample | BadInput]:
    """Yields the rows in order. Memory holds one record batch, which datasets limits to 1,000 rows.

    The rows of a damaged batch are lost. A stream that is cut does not say how many rows it had: they count as 0.
    """
    arrow, stem = import_pyarrow(), posixpath.splitext(posixpath.basename(shard.path))[0]
    with open_files.open_file(shard.path) as file:
        num_bytes, first = file.seek(0, io.SEEK_END), 0
        left = open_files.max_unpacked_bytes(num_bytes)
        file.seek(0)
        start = 0  # Offset of the next message.
        try:
            stream = arrow.ipc.open_stream(file)
            if arrow_columns.image_column(stream.schema) is None:  # The file has changed since it was found.
                raise arrow_columns.no_images(shard.path, stream.schema)
            columns = Columns(stream.schema, stem, fields, maps)
            start = file.tell()
            for batch in stream:
                size, start = file.tell() - start, file.tell()
                if first + batch.num_rows > MAX_SAMPLES:
                    raise ValueError("more rows than any file has")
                for sample in _rows(batch, columns, first, size):
                    left -= arrow_columns.num_bytes(sample) if isinstance(sample, Sample) else 0
                    if left < 0:
                        yield BadInput("decompression_bomb", 0, num_bytes - start, sample.key)
                        return
                    yield sample
                first += batch.num_rows
            # A stream that is cut between two messages lacks only its end; a damaged size may look like an end.
            if not start < file.tell() == num_bytes:
                raise ValueError("no end of the stream, or another one before it")
        except errors() as error:
            reraise_disk_error(error)
            yield BadInput("damaged_arrow", 0, num_bytes - start, f"{stem}/{first}")


def _rows(batch: Any, columns: Columns, first: int, num_bytes: int) -> Iterator[Sample | BadInput]:
    """Yields the rows of a batch. A stream has no checksum: all rows are lost if offsets or texts are damaged."""
    batch = batch.select(columns.names)
    try:
        batch.validate(full=True)
    except errors():
        yield BadInput("damaged_arrow", batch.num_rows, num_bytes, columns.row_key(first))
        return
    for start in range(0, batch.num_rows, _SLICE_ROWS):
        yield from columns.samples(batch.slice(start, _SLICE_ROWS), first + start)


def _schema(path: str) -> Any | None:
    """Columns and their types, read from the first message; None if it is damaged."""
    try:
        return import_pyarrow().ipc.open_stream(io.BytesIO(open_files.read_range(path, 0, _HEAD_BYTES))).schema
    except errors() as error:
        reraise_disk_error(error)
        return None
