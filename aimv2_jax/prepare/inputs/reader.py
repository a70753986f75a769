"""Reading of samples and fields of a shard of any format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs.formats import FORMATS
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, Sample

_MAX_SHARDS_PROBED = 5


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
    for kind in dict.fromkeys(shard.kind for shard in shards):
        first = [shard for shard in shards if shard.kind == kind][:_MAX_SHARDS_PROBED]
        found = [find_fields(shard) for shard in first]
        for shard in first:  # All samples are searched only for fields that the first samples do not have.
            if missing := _missing(fields, found):
                found.append(find_fields(shard, missing))
        missing = _missing(fields, found)
        if missing and any(names is not None for names in found):
            existing = ", ".join(_union(found)) or "only images"
            remedy = f"It has {existing}. A field is {FORMATS[kind].FIELD}"
            raise UserError(f"input has no such field ({first[0].path})", missing[0], remedy)


def _union(found: Iterable[Collection[str] | None]) -> list[str]:
    return list(dict.fromkeys(field for names in found for field in names or ()))


def _missing(fields: Sequence[str], found: Iterable[Collection[str] | None]) -> list[str]:
    existing = set(_union(found))
    return [field for field in fields if field not in existing]
