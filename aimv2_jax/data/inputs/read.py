"""Samples of a shard, whatever kind it is of; and the fields that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from aimv2_jax.data.inputs.kinds import KINDS
from aimv2_jax.data.inputs.samples import Damage, InputShard, Sample
from aimv2_jax.errors import UserError

_LOOKED_AT = 5


def read(shard: InputShard) -> Iterator[Sample | Damage]:
    """What the shard holds, in its order: samples given and samples in `Damage` are together all that it had.

    Damaged content never raises.

    Raises:
      UserError, OSError: if the file cannot be read at all, or a package is missing.
    """
    return KINDS[shard.kind].read(shard)


def default_captions(shard: InputShard) -> dict[str, str]:
    """KIND -> FIELD where the user names none; {} where nothing fits. The package's docstring says which."""
    found = fields_of(shard) or []
    return next(({"alt": field} for field in KINDS[shard.kind].CAPTIONS if field in found), {})


def fields_of(shard: InputShard) -> list[str] | None:
    """The fields that its header names or its first samples have; None if it has no samples or is too damaged."""
    return KINDS[shard.kind].fields(shard)


def check_fields(shards: Sequence[InputShard], fields: Iterable[str]) -> None:
    """Checks that each kind of input has the `fields`, one shard or another of its first `_LOOKED_AT`.

    So mistakes are told at once; a field that some shards lack is none.

    Raises:
      UserError: naming the field that is missing and those that are there. Shards too damaged to tell pass.
    """
    fields = list(fields)
    for kind in dict.fromkeys(shard.kind for shard in shards):
        first = [shard for shard in shards if shard.kind == kind][:_LOOKED_AT]
        known = [found for shard in first if (found := fields_of(shard)) is not None]
        there = list(dict.fromkeys(field for found in known for field in found))
        missing = [field for field in fields if known and field not in there]
        if missing:
            remedy = f"It has {', '.join(there) or 'nothing but pictures'}. A field is {KINDS[kind].FIELD}"
            raise UserError(f"input has no such field ({first[0].path})", missing[0], remedy)
