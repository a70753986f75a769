"""Samples of a shard, whatever kind it is of; and the fields that it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from aimv2_jax.data.inputs.kinds import KINDS
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.errors import UserError

_LOOKED_AT = 5


def read(shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | Damage]:
    """What the shard holds, in its order: samples given and samples in `Damage` are together all that it had.

    Damaged content never raises. What the samples have beside `fields` need not be read; None asks for all.

    Raises:
      UserError, OSError: if the file cannot be read at all, or a package is missing.
    """
    return KINDS[shard.kind].read(shard, fields)


def default_captions(shard: InputShard) -> dict[str, str]:
    """KIND -> FIELD where the user names none; {} where nothing fits. The package's docstring says which."""
    found = fields_of(shard) or []
    return next(({"alt": field} for field in KINDS[shard.kind].CAPTIONS if field in found), {})


def fields_of(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """The fields that its header names or its first samples have; None if it has no samples or is too damaged.

    All samples are asked about fields that are `wanted`.
    """
    return KINDS[shard.kind].fields(shard, wanted)


def check_fields(shards: Sequence[InputShard], fields: Iterable[str]) -> None:
    """Checks that each kind of input has the `fields`, one shard or another of its first `_LOOKED_AT`.

    So mistakes are told at once; a field that some shards lack is none.

    Raises:
      UserError: naming the field that is missing and those that are there. Shards too damaged to tell pass.
    """
    fields = list(fields)
    for kind in dict.fromkeys(shard.kind for shard in shards):
        first = [shard for shard in shards if shard.kind == kind][:_LOOKED_AT]
        found = [fields_of(shard) for shard in first]
        for shard in first:  # Their first samples tell mostly, and to ask all takes its time.
            if missing := _missing(fields, found):
                found.append(fields_of(shard, missing))
        missing = _missing(fields, found)
        if missing and any(names is not None for names in found):
            there = ", ".join(_union(found)) or "nothing but pictures"
            remedy = f"It has {there}. A field is {KINDS[kind].FIELD}"
            raise UserError(f"input has no such field ({first[0].path})", missing[0], remedy)


def _union(found: Iterable[Collection[str] | None]) -> list[str]:
    return list(dict.fromkeys(field for names in found for field in names or ()))


def _missing(fields: Sequence[str], found: Iterable[Collection[str] | None]) -> list[str]:
    there = set(_union(found))
    return [field for field in fields if field not in there]
