"""Input formats, and the reading of samples and fields of a shard of any format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import arrow, image_folder, parquet, tables, webdataset
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, Sample

SPLIT_FIELDS = ("split", "json:split")
"""Fields that may name the split of a row, of which an input has one."""
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

    def maps(self, shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
        """Returns the fields that can be second images, as `fields` does."""

    def classes(self, shard: InputShard) -> dict[str, tuple[str, ...]]:
        """Returns the class names of fields whose classes the shard declares, in the order of their numbers."""

    def read(
        self, shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
    ) -> Iterator[Sample | BadInput]:
        """Yields the shard's content in order; samples have at least `fields`, or all for None, and `maps`."""


FORMATS: dict[str, InputFormat] = {  # Tried in this order: the most reliable checks come first.
    "parquet": parquet,
    "arrow": arrow,
    "webdataset": webdataset,
    image_folder.KIND: image_folder,
    "jsonl": tables.Table(tables.JsonLines),
    "csv": tables.Table(tables.Csv),
}


def read(
    shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
) -> Iterator[Sample | BadInput]:
    """Yields the content of a shard in order: its samples plus those counted in `BadInput` are all that it had.

    Damaged content does not raise. Fields other than `fields` may be omitted; None reads all. Samples have the second
    images `maps`.

    Raises:
      UserError, OSError: if the file cannot be read at all, or a package is missing.
    """
    return FORMATS[shard.kind].read(shard, fields, maps)


def default_captions(shard: InputShard) -> dict[str, str]:
    """Default caption KIND -> FIELD, as listed in the package's docstring; {} if the shard has no such field."""
    existing = find_fields(shard) or []
    return next(({"alt": field} for field in FORMATS[shard.kind].CAPTIONS if field in existing), {})


def declared_classes(shard: InputShard) -> dict[str, tuple[str, ...]]:
    """Names of the classes that the shard declares, by field, in the order of their numbers.

    These fields are also the default labels.
    """
    return FORMATS[shard.kind].classes(shard)


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
    for kind, first in _first_shards(shards).items():
        missing, existing = _find_missing(FORMATS[kind].fields, first, list(fields))
        if missing:
            remedy = f"It has {existing or 'only images'}. A field is {FORMATS[kind].FIELD}"
            raise UserError(f"input has no such field ({first[0].path})", missing[0], remedy)


def check_maps(shards: Sequence[InputShard], fields: Iterable[str]) -> None:
    """Checks that each format of the input has second images in `fields`, as `check_fields` does."""
    for kind, first in _first_shards(shards).items():
        missing, existing = _find_missing(FORMATS[kind].maps, first, list(fields))
        if missing:
            remedy = f"It has {existing or 'none'}. A field is {FORMATS[kind].FIELD}"
            raise UserError(f"input has no such field of second images ({first[0].path})", missing[0], remedy)


def check_split(shards: Sequence[InputShard], split: str) -> None:
    """Raises `UserError` for a format whose shards are not of the `split` by name and have no field of splits."""
    for kind, first in _first_shards([shard for shard in shards if not shard.of_split]).items():
        found = [_find_missing(FORMATS[kind].fields, first, [field]) for field in SPLIT_FIELDS]
        if all(missing for missing, _ in found):
            what = f"--split {split}: no file or folder has this name, and rows have no {SPLIT_FIELDS[0]}"
            remedy = "Give the split's files, or --keep FIELD=VALUE for another field"
            raise UserError(what, first[0].path, remedy)


def check_default_captions(shards: Sequence[InputShard]) -> None:
    """Raises `UserError` for a format with neither default caption fields nor classes in its first readable shards."""
    for kind, first in _first_shards(shards).items():
        readable = [shard for shard in first if find_fields(shard) is not None]
        if readable and not any(default_captions(shard) or declared_classes(shard) for shard in readable):
            remedy = "Give --caption KIND=FIELD, --label NAME=FIELD or --image NAME=FIELD; see --help for FIELD"
            what = f"no --caption is given, and this {kind} input has none of the default fields"
            raise UserError(what, readable[0].path, remedy)


def _find_missing(
    find: Callable[[InputShard, Collection[str]], list[str] | None], first: Sequence[InputShard], fields: Sequence[str]
) -> tuple[list[str], str]:
    """Those of `fields` that no shard has, none if all shards are too damaged, and the fields that they have."""
    found = [find(shard, ()) for shard in first]
    for shard in first:  # All samples are searched only for fields that the first samples do not have.
        if missing := _missing(fields, found):
            found.append(find(shard, missing))
    return (_missing(fields, found) if any(names is not None for names in found) else []), ", ".join(_union(found))


def _first_shards(shards: Sequence[InputShard]) -> dict[str, list[InputShard]]:
    """The first shards of each format, several because some may be empty or damaged."""
    kinds = dict.fromkeys(shard.kind for shard in shards)
    return {kind: [shard for shard in shards if shard.kind == kind][:_MAX_SHARDS_PROBED] for kind in kinds}


def _union(found: Iterable[Collection[str] | None]) -> list[str]:
    return list(dict.fromkeys(field for names in found for field in names or ()))


def _missing(fields: Sequence[str], found: Iterable[Collection[str] | None]) -> list[str]:
    existing = set(_union(found))
    return [field for field in fields if field not in existing]
