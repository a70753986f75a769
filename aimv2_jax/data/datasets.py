"""Data sets: a folder of ArrayRecord shards and `dataset.json`, written last: a folder without it is unfinished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aimv2_jax.data.books import ASPECT, SIDE, Books, Histogram, Loss, Tally
from aimv2_jax.data.pictures import image_size
from aimv2_jax.data.records import BadRecord, Record, encode
from aimv2_jax.data.shards import Shard, ShardWriter, place_in
from aimv2_jax.errors import UserError
from aimv2_jax.files import write_whole

FORMAT_VERSION = 2  # Of dataset.json; the records of both versions are alike.
OLDEST_FORMAT = 1
DATASET_FILE = "dataset.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says.

    `kinds` counts the captions of each kind, `labels` names the labels that occur; `samples` came in, of which `drops`
    by reason and `lost` are no records, and `changes` tells which records are not quite their samples. `made` says how
    it was prepared. Of format version 1, which has no such accounts, they are empty.
    """

    format_version: int
    shards: tuple[Shard, ...]
    records: int
    bytes: int
    kinds: dict[str, int]
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
    def from_json(cls, text: str) -> DatasetInfo:
        """Raises `ValueError`, `KeyError` or `TypeError` for text that is not a `dataset.json` that can be read."""
        tree = json.loads(text)
        version = int(tree["format_version"])
        if not OLDEST_FORMAT <= version <= FORMAT_VERSION:
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
        return cls(
            format_version=version,
            shards=tuple(Shard(str(s["file"]), int(s["records"]), int(s["bytes"])) for s in tree["shards"]),
            records=int(tree["records"]),
            bytes=int(tree["bytes"]),
            kinds={str(kind): int(count) for kind, count in tree["kinds"].items()},
            labels=tuple(map(str, tree["labels"])),
            samples=int(tree["samples"]),
            histograms={name: Histogram.from_tree(entry) for name, entry in tree["histograms"].items()},
            drops={reason: Tally.from_tree(entry) for reason, entry in tree["drops"].items()},
            changes={what: Tally.from_tree(entry) for what, entry in tree["changes"].items()},
            lost={reason: Loss.from_tree(entry) for reason, entry in tree["lost"].items()},
            made=dict(tree["made"]),
        )


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
