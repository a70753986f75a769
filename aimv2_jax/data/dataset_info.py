"""Datasets: a folder of bag files, `records.index` and `dataset.json`, which is written last and marks completion."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimv2_jax import untrusted
from aimv2_jax.data.dataset_stats import (
    ASPECT,
    SIDE,
    DatasetStats,
    Histogram,
    LostInput,
    MapCount,
    SampleCount,
    count_of,
)
from aimv2_jax.data.record_index import write_index
from aimv2_jax.data.records import BadRecord, Record, encode
from aimv2_jax.data.shards import Shard, ShardWriter, move_into
from aimv2_jax.data.transforms.decode import image_size
from aimv2_jax.data.transforms.maps import decode_map
from aimv2_jax.errors import UserError
from aimv2_jax.storage.files import atomic_write

# Until version 3, shards were ArrayRecord files (see prepare/convert.py).
FORMAT_VERSION = 4
DATASET_FILE = "dataset.json"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Contents of `dataset.json`.

    `index_crc32` is the CRC-32 of `records.index`. `kinds` counts the captions of each kind, `records_with` the records
    that have one or more of them, `labels` lists the label names. `classes` has the records of each class of a label,
    in the order of the classes' numbers; a label whose values are no classes has none. `images` counts the second
    images of each name. `samples` is the number of input samples; `drops` (by
    reason) and `lost` did not become records, `changes` counts records that differ from their samples. `made` describes
    how the dataset was prepared.
    """

    format_version: int
    shards: tuple[Shard, ...]
    records: int
    bytes: int
    index_crc32: int
    kinds: dict[str, int]
    records_with: dict[str, int]
    labels: tuple[str, ...]
    samples: int
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    drops: dict[str, SampleCount] = dataclasses.field(default_factory=dict)
    changes: dict[str, SampleCount] = dataclasses.field(default_factory=dict)
    lost: dict[str, LostInput] = dataclasses.field(default_factory=dict)
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    images: dict[str, MapCount] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_stats(
        cls, stats: DatasetStats, shards: Iterable[Shard], index_crc32: int, made: Mapping[str, Any]
    ) -> DatasetInfo:
        """The info of a dataset with these shards, index and statistics."""
        shards = tuple(shards)
        assert sum(shard.records for shard in shards) == stats.records
        classes = {label: found.ordered() for label, found in sorted(stats.classes.items()) if label in stats.labels}
        return cls(
            format_version=FORMAT_VERSION,
            shards=shards,
            records=stats.records,
            bytes=sum(shard.bytes for shard in shards),
            index_crc32=index_crc32,
            kinds=dict(sorted(stats.kinds.items())),
            records_with=dict(sorted(stats.records_with.items())),
            labels=tuple(sorted(stats.labels)),
            samples=stats.samples,
            histograms=stats.histograms,
            drops=dict(sorted(stats.drops.items())),
            changes=dict(sorted(stats.changes.items())),
            lost=dict(sorted(stats.lost.items())),
            made=dict(made),
            classes={label: counts for label, counts in classes.items() if counts is not None},
            images=dict(sorted(stats.images.items())),
        )

    def to_json(self) -> str:
        """The text of `dataset.json`: one key per field of this class."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> DatasetInfo:
        """Parses `dataset.json`; raises `ValueError`, `KeyError` or `TypeError` for invalid text."""
        tree = untrusted.parse_json_object(text)
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}")
        if not {SIDE, ASPECT} <= tree["histograms"].keys():
            raise ValueError("a histogram is missing")
        kinds = _counts(tree["kinds"])
        records_with = _counts(tree["records_with"])
        if records_with.keys() != kinds.keys() or any(records_with[kind] > kinds[kind] for kind in kinds):
            raise ValueError("more records with captions than captions")
        return cls(
            format_version=version,
            shards=tuple(Shard(str(s["file"]), count_of(s["records"]), count_of(s["bytes"])) for s in tree["shards"]),
            records=count_of(tree["records"]),
            bytes=count_of(tree["bytes"]),
            index_crc32=count_of(tree["index_crc32"]),
            kinds=kinds,
            records_with=records_with,
            labels=tuple(map(str, tree["labels"])),
            samples=count_of(tree["samples"]),
            histograms={name: Histogram.from_tree(entry) for name, entry in tree["histograms"].items()},
            drops={reason: SampleCount.from_tree(entry) for reason, entry in tree["drops"].items()},
            changes={name: SampleCount.from_tree(entry) for name, entry in tree["changes"].items()},
            lost={reason: LostInput.from_tree(entry) for reason, entry in tree["lost"].items()},
            made=dict(tree["made"]),
            # Datasets prepared by earlier programs have neither.
            classes={str(label): _counts(counts) for label, counts in tree.get("classes", {}).items()},
            images={str(name): MapCount.from_tree(entry) for name, entry in tree.get("images", {}).items()},
        )


def _counts(tree: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): count_of(value) for name, value in tree.items()}


def write_dataset(
    folder: str | Path,
    records: Iterable[Record],
    shard_bytes: int = 1 << 30,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> DatasetInfo:
    """Writes `records` in order to `folder`, in shards of about `shard_bytes`; equal records give equal bytes.

    Each file is written atomically: first the shards, then their index, then `dataset.json`. `classes` has the names of
    a label's classes in the order of their numbers; other labels get those that the records have.

    Raises:
      UserError: if the folder already holds a dataset.
    """
    folder = Path(folder)
    if (folder / DATASET_FILE).exists():
        raise UserError(
            "the folder already holds a dataset", str(folder), "Remove it first, or write to another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stats = DatasetStats()
    for label, names in (classes or {}).items():
        stats.declare(label, names)
    with ShardWriter(folder, move_into(folder), shard_bytes) as writer:
        for record in records:
            writer.write(encode(record))
            stats.keep(record.captions, record.labels, _image_size(record.image), _map_counts(record))
    index_crc32 = write_index(folder, writer.shards, folder, move_into(folder))
    info = DatasetInfo.from_stats(stats, writer.shards, index_crc32, made={})
    atomic_write(folder / DATASET_FILE, info.to_json().encode())
    return info


def _image_size(image: bytes) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except BadRecord:
        return None


def _map_counts(record: Record) -> dict[str, MapCount]:
    counts = {}
    for name, data in record.images.items():
        with contextlib.suppress(BadRecord):
            counts[name] = MapCount.of(decode_map(data), record.key)
    return counts
