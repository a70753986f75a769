"""The kinds of input, and what each must know of itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from aimv2_jax.data.inputs import parquet, tables, webdataset
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.errors import UserError


class Kind(Protocol):
    """A kind of input: a module or an object."""

    FIELD: str  # What a field can be, in words.
    CAPTIONS: tuple[str, ...]  # Fields that are captions where the user names none: the first that is there.

    def recognises(self, head: bytes, path: str) -> bool:
        """Whether a file that begins with `head` is of this kind, or calls itself so, whatever became of it."""

    def shards(self, path: str, num_bytes: int) -> list[InputShard] | UserError:
        """The parts of the file; or, without raising it, what is wrong if no pictures can be had from it."""

    def fields(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """The fields of the shard by its header, or by its first samples and, for those that are `wanted`, by all.

        None if it is too damaged to tell.
        """

    def read(self, shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | Damage]:
        """What the shard holds, in its order; its samples have at least `fields`, all of them for None."""


KINDS: dict[str, Kind] = {  # In the order of asking: what is least mistaken first.
    "parquet": parquet,
    "webdataset": webdataset,
    "jsonl": tables.Table(tables.JsonLines),
    "csv": tables.Table(tables.Csv),
}
