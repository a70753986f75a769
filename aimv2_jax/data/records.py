"""Records: a picture's bytes, its captions by kind and its labels, with version and checksum; and data sets of them.

A record is `version (1 byte) | crc32 of the rest (4 bytes, little endian) | msgpack {key, image, captions, labels}`.
A data set is a folder of ArrayRecord shards and `dataset.json`, written last: a folder without it is unfinished.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from aimv2_jax.errors import UserError

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
REASONS = (
    "unreadable_record",
    "corrupt_record",
    "missing_caption",
    "empty_caption",
    "empty_image",
    "oversized_image",
    "undecodable_image",
)
"""Why a record can be unusable; the last axis of a batch's `faults`."""

_HEADER = struct.Struct("<BI")
# group_size 1: a random read takes 25 us, at 64 it takes 500. Pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


class BadRecord(Exception):
    """A record that cannot be used, for one of `REASONS`; `key` is its own name where that could still be read."""

    def __init__(self, reason: str, key: str | None = None):
        assert reason in REASONS, reason
        self.reason, self.key = reason, key
        super().__init__(reason, key)

    def __str__(self) -> str:
        return self.reason if self.key is None else f"{self.reason}: {self.key}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture: `image` as the encoded file's bytes, `captions` by kind, `labels` by name."""

    key: str
    image: bytes
    captions: dict[str, str]
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def encode(record: Record) -> bytes:
    """The record as bytes, the same for equal records."""
    captions, labels = dict(sorted(record.captions.items())), dict(sorted(record.labels.items()))
    payload = msgpack.packb({"key": record.key, "image": record.image, "captions": captions, "labels": labels})
    return _HEADER.pack(FORMAT_VERSION, zlib.crc32(payload)) + payload


def decode(data: bytes) -> Record:
    """The record in `data`; raises `BadRecord("corrupt_record")` unless every bit is as it was written."""
    if len(data) <= _HEADER.size:
        raise BadRecord("corrupt_record")
    version, checksum = _HEADER.unpack_from(data)
    payload = memoryview(data)[_HEADER.size :]
    if version != FORMAT_VERSION or zlib.crc32(payload) != checksum:
        raise BadRecord("corrupt_record")
    try:
        record = Record(**msgpack.unpackb(payload))
        texts = [record.key, *record.captions.keys(), *record.captions.values(), *record.labels.keys()]
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise BadRecord("corrupt_record") from error
    if not isinstance(record.image, bytes) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("corrupt_record")
    return record


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a data set, as `dataset.json` lists it."""

    file: str
    records: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says: `kinds` counts the captions of each kind, `labels` names the labels that occur."""

    format_version: int
    shards: tuple[Shard, ...]
    records: int
    bytes: int
    kinds: dict[str, int]
    labels: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetInfo:
        """Raises `ValueError`, `KeyError` or `TypeError` for text that is not a `dataset.json`."""
        tree = json.loads(text)
        return cls(
            format_version=int(tree["format_version"]),
            shards=tuple(Shard(str(s["file"]), int(s["records"]), int(s["bytes"])) for s in tree["shards"]),
            records=int(tree["records"]),
            bytes=int(tree["bytes"]),
            kinds={str(kind): int(count) for kind, count in tree["kinds"].items()},
            labels=tuple(tree["labels"]),
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
    shards: list[Shard] = []
    kinds: collections.Counter[str] = collections.Counter()
    labels: set[str] = set()

    def encoded() -> Iterator[bytes]:
        for record in records:
            kinds.update(record.captions.keys())
            labels.update(record.labels)
            yield encode(record)

    for number, part in enumerate(_shares(encoded(), shard_bytes)):
        shards.append(_write_shard(folder / f"{number:05d}.arrayrecord", part))
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        shards=tuple(shards),
        records=sum(shard.records for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        kinds=dict(sorted(kinds.items())),
        labels=tuple(sorted(labels)),
    )
    with _appearing(folder / DATASET_FILE) as part:
        part.write_text(info.to_json(), encoding="utf-8")
    return info


def _shares(items: Iterable[bytes], limit: int) -> Iterator[Iterator[bytes]]:
    """Splits `items` into runs, each closed by the item that brings it to `limit` bytes. Consume each run in turn."""
    iterator = iter(items)
    for first in iterator:

        def run(first: bytes = first) -> Iterator[bytes]:
            yield first
            size = len(first)
            while size < limit and (item := next(iterator, None)) is not None:
                size += len(item)
                yield item

        yield run()


def _write_shard(path: Path, items: Iterator[bytes]) -> Shard:
    count = 0
    with _appearing(path) as part:
        writer = ArrayRecordWriter(str(part), _WRITER_OPTIONS)
        try:
            for item in items:
                writer.write(item)
                count += 1
        finally:
            writer.close()
    return Shard(path.name, count, path.stat().st_size)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block has succeeded and removed when it has not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
