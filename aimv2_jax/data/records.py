"""Record format: an image's bytes, its captions by kind, labels and second images, with version and checksum.

A record is `version (1 byte) | crc32 of the rest (4 bytes, little endian) | msgpack {key, image, captions, labels}`.
`captions` maps a kind to a text or, from version 2 on, to a list of texts. From version 3 on there is also `images`,
which maps a name to the encoded bytes of a second image, for example a mask.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib

import msgpack

RECORD_VERSION = 3
"""The newest readable version. A record is written as the oldest version that can hold it, which older programs read.

Older programs refuse a record with second images (`other_version`): without them it would be another example."""
MAX_KEY_LETTERS = 500
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
"""Reasons why a record is unusable; the last axis of a batch's `faults`."""
MAP_REASONS = ("empty_map", "oversized_map", "undecodable_map", "map_not_png", "map_with_colours")
"""Reasons why a second image of a record is unusable (`transforms/maps.py`); training never decodes one."""

_HEADER = struct.Struct("<BI")


class BadRecord(Exception):
    """An unusable record, with one of `REASONS` or `MAP_REASONS`; `key` is the record's key if it could be read."""

    def __init__(self, reason: str, key: str | None = None):
        assert reason in REASONS or reason in MAP_REASONS, reason
        self.reason = reason
        self.key = key
        super().__init__(reason, key)

    def __str__(self) -> str:
        return self.reason if self.key is None else f"{self.reason}: {self.key}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One example: `image` as the encoded file's bytes, `captions` by kind, `labels` by name.

    `images` has second images of the same size by name (masks, depth maps), each as the encoded file's bytes.
    """

    key: str
    image: bytes
    captions: dict[str, str | list[str]]
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def texts(self, kind: str) -> list[str]:
        """The record's captions of `kind` in order; empty if it has none."""
        return texts_of(self.captions.get(kind, []))


def texts_of(captions: str | list[str]) -> list[str]:
    """The captions of one kind as a list."""
    return [captions] if isinstance(captions, str) else captions


def bounded_key(key: str) -> str:
    """`key`; one longer than `MAX_KEY_LETTERS` is cut and ends with a hash, so that keys stay distinct."""
    if len(key) <= MAX_KEY_LETTERS:
        return key
    digest = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
    return f"{key[: MAX_KEY_LETTERS - len(digest) - 3]}...{digest}"


def encode(record: Record) -> bytes:
    """Serializes a record; equal records give equal bytes."""
    texts = {kind: record.texts(kind) for kind in sorted(record.captions)}
    captions = {kind: values[0] if len(values) == 1 else values for kind, values in texts.items() if values}
    labels = dict(sorted(record.labels.items()))
    tree = {"key": record.key, "image": record.image, "captions": captions, "labels": labels}
    version = 1 if all(isinstance(value, str) for value in captions.values()) else 2
    if record.images:
        version, tree["images"] = 3, dict(sorted(record.images.items()))
    payload = msgpack.packb(tree)
    return _HEADER.pack(version, zlib.crc32(payload)) + payload


def is_intact(data: bytes) -> bool:
    """Whether the checksum of a record fits."""
    return len(data) > _HEADER.size and zlib.crc32(memoryview(data)[_HEADER.size :]) == _HEADER.unpack_from(data)[1]


def decode(data: bytes) -> Record:
    """Parses a record; a key that is too long is shortened by `bounded_key`.

    Raises:
      BadRecord: `corrupt_record`, or `other_version` if only the version is wrong.
    """
    if not is_intact(data):
        raise BadRecord("corrupt_record")
    version, _ = _HEADER.unpack_from(data)
    payload = memoryview(data)[_HEADER.size :]
    if not 1 <= version <= RECORD_VERSION:
        raise BadRecord("other_version")
    try:
        record = Record(**msgpack.unpackb(payload))
        if bool(record.images) != (version >= 3):
            raise BadRecord("other_version")
        texts = [record.key, *record.captions, *record.labels, *record.labels.values(), *record.images]
        images = [record.image, *record.images.values()]
        for captions in record.captions.values():
            texts += captions if version > 1 and isinstance(captions, list) else [captions]
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise BadRecord("corrupt_record") from error
    if not all(isinstance(image, bytes) for image in images) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("corrupt_record")
    key = bounded_key(record.key)
    return record if key is record.key else dataclasses.replace(record, key=key)
