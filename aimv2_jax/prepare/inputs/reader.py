"""Input formats, and the reading of samples and fields of a shard of any format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import parquet, tables, webdataset
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, Sample

_MAX_SHARDS_PROBED = 5


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


def read(shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | BadInput]:
    """Yields the content of a shard in order: its samples plus those counted in `BadInput` are all that it had.

    Damaged content does not raise. Fields other than `fields` may be omitted; None reads all.

    Raises:
      UserError, OSError: if the file cannot be read at all, or a package is missing.
    """
    return FORMATS[shard.kind].read(shard, fields)


def default_captions(shard: InputShard) -> dict[str, str]:
    """Default caption KIND -> FIELD, as listed in the package's docstring; {} if the shard has no such field."""
    existing = find_fields(shard) or []
    return next(({"alt": field} for field in FORMATS[shard.kind].CAPTIONS if field in existing), {})


def find_fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Fields in the shard's header or first samples; None if it has no samples or is too damaged.

    All samples are searched for fields that are `wanted`.
    """
    return FORMATS[shard.kind].fields(shard, wanted)


def check_fields(shards: Sequence[InputShard], fields: Iterable[str]) -> None:
    """Checks that each format of the input has the `fields`, in any of its first `_MAX_SHARDS_PROBED` shards.

    Wrong field names fail before the work starts. A field may be missing in some shards.

    Raises:
      UserError: naming the missing field and the existing ones. Shards that are too damaged pass.
    """
    fields = list(fields)
    for kind, first in _first_shards(shards).items():
        found = [find_fields(shard) for shard in first]
        for shard in first:  # All samples are searched only for fields that the first samples do not have.
            if missing := _missing(fields, found):
                found.append(find_fields(shard, missing))
        missing = _missing(fields, found)
        if missing and any(names is not None for names in found):
            existing = ", ".join(_union(found)) or "only images"
            remedy = f"It has {existing}. A field is {FORMATS[kind].FIELD}"
            raise UserError(f"input has no such field ({first[0].path})", missing[0], remedy)


def check_default_captions(shards: Sequence[InputShard]) -> None:
    """Raises `UserError` for a format that has none of its default caption fields in its first readable shards."""
    for kind, first in _first_shards(shards).items():
        readable = [shard for shard in first if find_fields(shard) is not None]
        if readable and not any(map(default_captions, readable)):
            remedy = "Give --caption KIND=FIELD; see --help for FIELD"
            what = f"no --caption is given, and this {kind} input has none of the default fields"
            raise UserError(what, readable[0].path, remedy)


def _first_shards(shards: Sequence[InputShard]) -> dict[str, list[InputShard]]:
    """The first shards of each format, several because some may be empty or damaged."""
    kinds = dict.fromkeys(shard.kind for shard in shards)
    return {kind: [shard for shard in shards if shard.kind == kind][:_MAX_SHARDS_PROBED] for kind in kinds}


def _union(found: Iterable[Collection[str] | None]) -> list[str]:
    return list(dict.fromkeys(field for names in found for field in names or ()))


def _missing(fields: Sequence[str], found: Iterable[Collection[str] | None]) -> list[str]:
    existing = set(_union(found))
    return [field for field in fields if field not in existing]
