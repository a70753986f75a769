"""Records: a picture's bytes, its captions by kind and its labels, with version and checksum.

A record is `version (1 byte) | crc32 of the rest (4 bytes, little endian) | msgpack {key, image, captions, labels}`.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

import msgpack

RECORD_VERSION = 1
REASONS = (
    "unreadable_record",
    "corrupt_record",
    "other_version",
    "missing_caption",
    "empty_caption",
    "empty_image",
    "oversized_image",
    "costly_image",
    "undecodable_image",
)
"""Why a record can be unusable; the last axis of a batch's `faults`."""

_HEADER = struct.Struct("<BI")


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
    return _HEADER.pack(RECORD_VERSION, zlib.crc32(payload)) + payload


def decode(data: bytes) -> Record:
    """The record in `data`, every bit as it was written.

    Raises:
      BadRecord: `corrupt_record`, or `other_version` where all but the version is whole.
    """
    if len(data) <= _HEADER.size:
        raise BadRecord("corrupt_record")
    version, checksum = _HEADER.unpack_from(data)
    payload = memoryview(data)[_HEADER.size :]
    if zlib.crc32(payload) != checksum:
        raise BadRecord("corrupt_record")
    if version != RECORD_VERSION:
        raise BadRecord("other_version")
    try:
        record = Record(**msgpack.unpackb(payload))
        texts = [record.key, *record.captions.keys(), *record.captions.values(), *record.labels.keys()]
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise BadRecord("corrupt_record") from error
    if not isinstance(record.image, bytes) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("corrupt_record")
    return record
