"""Registry of input formats and the interface that each implements."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import parquet, tables, webdataset
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, Sample


class InputFormat(Protocol):
    """An input format, implemented by a module or an object."""

    FIELD: str  # Description of valid field names, for error messages.
    CAPTIONS: tuple[str, ...]  # Default caption fields, in order of preference.

    def recognises(self, head: bytes, path: str) -> bool:
        """Whether a file has this format by its first bytes `head`, or by the suffix of `path` even if damaged."""

    def shards(self, path: str, num_bytes: int) -> list[InputShard] | UserError:
        """Returns the shards of the file, or the error (without raising it) if it provides no images."""

    def fields(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """Returns the fields in the header or the first samples; all samples are searched for `wanted` fields.

        None if the shard is too damaged.
        """

    def read(self, shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | BadInput]:
        """Yields the shard's content in order; samples have at least `fields`, or all fields for None."""


FORMATS: dict[str, InputFormat] = {  # Tried in this order: the most reliable checks come first.
    "parquet": parquet,
    "webdataset": webdataset,
    "jsonl": tables.Table(tables.JsonLines),
    "csv": tables.Table(tables.Csv),
}
