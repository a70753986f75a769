"""Columns of Arrow tables, from parquet files and saved Hugging Face datasets, and their conversion to samples."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.hugging_face import Features
from aimv2_jax.prepare.inputs.samples import MapFile, OutOfRange, Sample
from aimv2_jax.prepare.inputs.text_encoding import escape_name

FIELD = "a column of texts, lists of texts, numbers or truth values"
IMAGES = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
_KEYS = ("key", "__key__", "id", "uid")
_STATUS, _FAILED = "status", "failed"  # img2dataset writes failed_to_download and failed_to_resize.
_TEXT_TYPES = ("string", "large_string", "string_view")
_BYTES_TYPES = ("binary", "large_binary", "binary_view")
_LIST_TYPES = ("list", "large_list", "fixed_size_list")
_FIELD_TYPES = ("boolean", "integer", "floating", "decimal", *_TEXT_TYPES, *_BYTES_TYPES)
_NO_CLASS = -1  # Number of an example without a class in datasets of Hugging Face.


class Columns:
    """The columns to read, and their conversion to samples.

    Args:
      schema: the table's Arrow schema.
      stem: beginning of the keys of rows without a key.
      fields: fields to read, None for all.
      maps: columns of second images to read.

    Attributes:
      names: the columns to read.
      paths: the same, as parquet names them.
    """

    def __init__(self, schema: Any, stem: str, fields: Collection[str] | None, maps: Collection[str] = ()):
        image = image_column(schema)
        assert image is not None
        self._image, self._stem = image, escape_name(stem)
        names = field_columns(schema)
        self._key = next((name for name in _KEYS if name in names), None)
        # Other columns are not read, because they may be damaged or too wide.
        self._fields = [name for name in names if fields is None or name in (*fields, self._key, _STATUS)]
        self._maps = [name for name in map_columns(schema) if name in maps]
        self._classes = class_names(schema)
        self.names = [image, *self._maps, *self._fields]
        self.paths = [*(_bytes_path(schema, name) for name in (image, *self._maps)), *self._fields]

    def row_key(self, row: int) -> str:
        """The key of a row without a key."""
        return f"{self._stem}/{row}"

    def samples(self, batch: Any, first: int) -> Iterator[Sample]:
        """Yields the rows of a record batch, of which `first` is the first one's number in the table."""
        images = _values(batch.column(self._image))
        rows = {name: _values(batch.column(name)) for name in self._fields}
        rows |= {
            name: [_class(value, self._classes[name]) for value in rows[name]]
            for name in self._classes.keys() & rows.keys()
        }
        maps = {name: _values(batch.column(name)) for name in self._maps}
        for row, value in enumerate(images):
            row_fields = {name: values[row] for name, values in rows.items() if values[row] is not None}
            image, absence = _file(value)
            status = row_fields.get(_STATUS)
            if (status.decode(errors="replace") if isinstance(status, bytes) else str(status)).startswith(_FAILED):
                image, absence = None, open_files.MISSING
            key = row_fields.get(self._key)
            key = escape_name(key if isinstance(key, bytes) else str(key)) if key is not None else None
            row_maps = {name: MapFile(*_file(values[row])) for name, values in maps.items()}
            yield Sample(key or self.row_key(first + row), image, row_fields, absence, row_maps)


def image_column(schema: Any) -> str | None:
    """The first column of `IMAGES` that exists once and can hold images, or the first whose feature is an image."""
    return next((name for name in (*IMAGES, *Features.of(schema).images) if _holds_files(schema, name)), None)


def map_columns(schema: Any) -> list[str]:
    """Columns that can hold second images."""
    image = image_column(schema)
    return [name for name in schema.names if name != image and _holds_files(schema, name)]


def field_columns(schema: Any) -> list[str]:
    """Columns that exist once and whose values can be converted to text."""
    image = image_column(schema)
    names = [name for name in schema.names if name != image and schema.names.count(name) == 1]
    kinds = {name: _item_type(schema, name) for name in names}
    return [name for name in names if _is(kinds[name], _FIELD_TYPES) or _is_list(kinds[name])]


def class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Columns of class numbers, with the names of the classes in the order of their numbers."""
    classes = Features.of(schema).classes
    return {
        name: names
        for name, names in classes.items()
        if schema.names.count(name) == 1 and _is(_item_type(schema, name), ("integer",))
    }


def num_bytes(sample: Sample) -> int:
    """Bytes of the images and texts of a sample."""
    values = [sample.image, *(file.data for file in sample.maps.values())]
    for value in sample.fields.values():
        values += value if isinstance(value, list) else [value]
    return sum(len(value) for value in values if isinstance(value, str | bytes))


def errors() -> tuple[type[BaseException], ...]:
    """Exceptions that pyarrow raises for damaged bytes; wrong sizes also cause OSError and MemoryError."""
    arrow = import_pyarrow()
    return (arrow.ArrowException, ValueError, OSError, MemoryError)


def reraise_disk_error(error: BaseException) -> None:
    """Raises `error` again if the system raised it: pyarrow's own OSErrors have no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def import_pyarrow() -> Any:
    """The module pyarrow, an optional dependency; raises `UserError` without it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        remedy = "Install it: pip install aimv2_jax[parquet]"
        raise UserError("parquet and Arrow need a package that is missing", "pyarrow", remedy) from error
    return pyarrow


def no_images(path: str, schema: Any) -> UserError:
    """The error for a table without a column of images."""
    remedy = "Give it a column of bytes, or of {bytes, path}, with one of the names " + ", ".join(IMAGES)
    return UserError(f"the table has no column of images ({path})", schema.names, remedy)


def _class(value: Any, names: tuple[str, ...]) -> str | OutOfRange | None:
    if value is None or value == _NO_CLASS:
        return None
    return names[value] if 0 <= value < len(names) else OutOfRange(value)


def _file(value: Any) -> tuple[bytes | None, str]:
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        return None, open_files.MISSING
    return (None, "oversized_file") if len(value) > open_files.MAX_FILE_BYTES else (value, open_files.MISSING)


def _values(column: Any) -> list[Any]:
    """Converts a column to Python values; texts that are not UTF-8 become bytes, decimals become strings."""
    arrow = import_pyarrow()
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
    types = import_pyarrow().types
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_list(kind: Any) -> bool:
    """Whether a column holds lists of texts."""
    return _is(kind, _LIST_TYPES) and _is(kind.value_type, _TEXT_TYPES)


def _item_type(schema: Any, name: str) -> Any:
    """The type of a column's values; of its distinct values if they are stored as a dictionary."""
    kind = schema.field(name).type
    return kind.value_type if _is(kind, ("dictionary",)) else kind


def _holds_files(schema: Any, name: str) -> bool:
    """Whether the column exists once and has bytes, or {bytes, path}."""
    if schema.names.count(name) != 1:
        return False
    kind = _item_type(schema, name)
    if _is(kind, ("struct",)):
        return any(part.name == "bytes" and _is(part.type, _BYTES_TYPES) for part in kind)
    return _is(kind, _BYTES_TYPES)


def _bytes_path(schema: Any, name: str) -> str:
    return f"{name}.bytes" if _is(schema.field(name).type, ("struct",)) else name
