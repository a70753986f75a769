"""Samples of a shard, whatever kind it is of; and the fields that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from aimv2_jax.data.inputs import captions, parquet, webdataset
from aimv2_jax.data.inputs.discover import InputShard
from aimv2_jax.data.inputs.samples import Damage, Sample
from aimv2_jax.errors import UserError

TABLES = ("parquet", "csv")  # All their rows have the columns of the header.
_CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")


def read(shard: InputShard) -> Iterator[Sample | Damage]:
    """What the shard holds, in its order: samples given and samples in `Damage` are together all that it had.

    Damaged content never raises.

    Raises:
      UserError, OSError: if the file cannot be read at all, or a package is missing.
    """
    if shard.kind == "webdataset":
        return webdataset.read(shard.path)
    if shard.kind == "parquet":
        return parquet.read(shard.path)
    return captions.read(shard.path, shard.kind, shard.start, shard.stop)


def default_captions(shard: InputShard) -> dict[str, str]:
    """KIND -> FIELD where the user names none; {} where nothing fits. The package's docstring says which."""
    wanted = ("txt", "json:caption") if shard.kind == "webdataset" else _CAPTIONS
    found = fields_of(shard) or []
    return next(({"alt": field} for field in wanted if field in found), {})


def check_fields(shards: Sequence[InputShard], fields: Iterable[str]) -> None:
    """Checks that the shards, all of one kind, have the `fields`: by the header of each, or the first samples of all.

    Raises:
      UserError: naming the field that is missing and those that are there. Shards too damaged to tell pass.
    """
    fields = list(fields)
    if shards[0].kind == "webdataset":
        for field in fields:
            webdataset.check_field(shards[0].path, field)
    there = {shard: found for shard in shards if (found := fields_of(shard)) is not None}
    if shards[0].kind not in TABLES:  # Their samples may differ: what one lacks, another has.
        there = {shard: list(dict.fromkeys(name for names in there.values() for name in names)) for shard in there}
    for shard, found in there.items():
        for field in fields:
            if field not in found:
                has = ", ".join(found) or "nothing but pictures"
                raise UserError(f"input has no such field ({shard.path})", field, f"It has {has}")


def fields_of(shard: InputShard) -> list[str] | None:
    """The fields that its header names or its first samples have; None if it has no samples or is too damaged."""
    if shard.kind == "webdataset":
        return webdataset.fields(shard.path)
    if shard.kind == "parquet":
        return parquet.fields(shard.path)
    return captions.fields(shard.path, shard.kind, shard.start)
