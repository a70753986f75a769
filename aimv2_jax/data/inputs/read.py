"""Samples of a shard, whatever kind it is of; and the fields that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from aimv2_jax.data.inputs import captions, parquet, webdataset
from aimv2_jax.data.inputs.discover import InputShard
from aimv2_jax.data.inputs.samples import Damage, Sample
from aimv2_jax.errors import UserError

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
    found = _fields(shard) or []
    return next(({"alt": field} for field in wanted if field in found), {})


def check_fields(shard: InputShard, fields: Iterable[str]) -> None:
    """Checks that the shard has the `fields`, by its header or its first samples.

    Raises:
      UserError: naming the field that is missing and those that are there. A shard too damaged to tell passes.
    """
    fields = list(fields)
    if shard.kind == "webdataset":
        for field in fields:
            webdataset.check_field(shard.path, field)
    found = _fields(shard)
    if found is None:
        return
    for field in fields:
        if field not in found:
            there = ", ".join(found) or "nothing but pictures"
            raise UserError(f"input has no such field ({shard.path})", field, f"It has {there}")


def _fields(shard: InputShard) -> list[str] | None:
    if shard.kind == "webdataset":
        return webdataset.fields(shard.path)
    if shard.kind == "parquet":
        return parquet.fields(shard.path)
    return captions.fields(shard.path, shard.kind, shard.start)
