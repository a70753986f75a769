"""Data sets: a folder of ArrayRecord shards and `dataset.json`, written last: a folder without it is unfinished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aimv2_jax import untrusted
from aimv2_jax.data.books import ASPECT, SIDE, Books, Histogram, Loss, Tally, count_of
from aimv2_jax.data.pictures import image_size
from aimv2_jax.data.records import BadRecord, Record, encode
from aimv2_jax.data.shards import Shard, ShardWriter, place_in
from aimv2_jax.errors import UserError
from aimv2_jax.files import write_whole

FORMAT_VERSION = 3  # Of dataset.json; 3 counts the records with each kind, which may have several captions of it.
OLDEST_FORMAT = 1
DATASET_FILE = "dataset.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says.

    `kinds` counts the captions of each kind, `records_with` the records that have one or more of them, `labels` names
    the labels that occur; `samples` came in, of which `drops` by reason and `lost` are no records, and `changes` tells
    which records are not quite their samples. `made` says how it was prepared. Of format version 1, which has no such
    accounts, they are empty. Before version 3 a record has one caption of a kind.
    """

    format_version: int
    shards: tuple[Shard, ...]
    records: int
    bytes: int
    kinds: dict[str, int]
    records_with: dict[str, int]
    labels: tuple[str, ...]
    samples: int
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    drops: dict[str, Tally] = dataclasses.field(default_factory=dict)
    changes: dict[str, Tally] = dataclasses.field(default_factory=dict)
    lost: dict[str, Loss] = dataclasses.field(default_factory=dict)
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, books: Books, shards: Iterable[Shard], made: Mapping[str, Any]) -> DatasetInfo:
        """The data set of `shards`, whose books are `books`."""
        shards = tuple(shards)
        assert sum(shard.records for shard in shards) == books.records
        return cls(
            format_version=FORMAT_VERSION,
            shards=shards,
            records=books.records,
            bytes=sum(shard.bytes for shard in shards),
            kinds=dict(sorted(books.kinds.items())),
            records_with=dict(sorted(books.records_with.items())),
            labels=tuple(sorted(books.labels)),
            samples=books.samples,
            histograms=books.histograms,
            drops=dict(sorted(books.drops.items())),
            changes=dict(sorted(books.changes.items())),
            lost=dict(sorted(books.lost.items())),
            made=dict(made),
        )

    def to_json(self) -> str:
        """The text of `dataset.json`: a key a field, as they are named here."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetInfo:
        """Raises `ValueError`, `KeyError` or `TypeError` for text that is not a `dataset.json` that can be read."""
        tree = untrusted.parse_json_object(text)
        version = tree["format_version"]
        if version not in range(OLDEST_FORMAT, FORMAT_VERSION + 1):
            raise ValueError(f"format version {version}")
        if version == 1:
            tree = {
                "samples": tree["records"],
                "histograms": {},
                "drops": {},
                "changes": {},
                "lost": {},
                "made": {},
            } | tree
        if version > 1 and not {SIDE, ASPECT} <= tree["histograms"].keys():
            raise ValueError("a histogram is missing")
        kinds = _counts(tree["kinds"])
        records_with = _counts(tree["records_with"]) if version > 2 else kinds
        if records_with.keys() != kinds.keys() or any(records_with[kind] > kinds[kind] for kind in kinds):
            raise ValueError("more records with captions than captions")
        return cls(
            format_version=version,
            shards=tuple(Shard(str(s["file"]), count_of(s["records"]), count_of(s["bytes"])) for s in tree["shards"]),
            records=count_of(tree["records"]),
            bytes=count_of(tree["bytes"]),
            kinds=kinds,
            records_with=records_with,
            labels=tuple(map(str, tree["labels"])),
            samples=count_of(tree["samples"]),
            histograms={name: Histogram.from_tree(entry) for name, entry in tree["histograms"].items()},
            drops={reason: Tally.from_tree(entry) for reason, entry in tree["drops"].items()},
            changes={what: Tally.from_tree(entry) for what, entry in tree["changes"].items()},
            lost={reason: Loss.from_tree(entry) for reason, entry in tree["lost"].items()},
            made=dict(tree["made"]),
        )


def _counts(tree: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): count_of(value) for name, value in tree.items()}


def write_dataset(folder: str | Path, records: Iterable[Record], shard_bytes: int = 1 << 30) -> DatasetInfo:
    """Writes `records` in their order to `folder`, in shards of about `shard_bytes`; equal records give equal bytes.

    A shard appears under its name only when it is whole, `dataset.json` only when all of them are.

    Raises:
      UserError: if the folder already holds a data set.
    """
    folder = Path(folder)
    if (folder / DATASET_FILE).exists():
        raise UserError("there is a data set already", str(folder), "Remove it first, or write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    books = Books()
    with ShardWriter(folder, place_in(folder), shard_bytes) as writer:
        for record in records:
            writer.write(encode(record))
            books.keep(record.captions, record.labels, _size(record.image))
    info = DatasetInfo.of(books, writer.shards, made={})
    write_whole(folder / DATASET_FILE, info.to_json().encode())
    return info


def _size(image: bytes) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except BadRecord:
        return None
