"""Input shards, their samples, and counts of input that could not be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

TABLE_CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")  # Default caption columns.
MAX_SAMPLES = 10**8  # Per file; larger announced counts are treated as damage.


@dataclasses.dataclass(frozen=True)
class InputShard:
    """Part of the input that is read in sequence: a tar, a parquet file, rows of a table, files of an image folder."""

    kind: str  # A key of `reader.FORMATS`.
    path: str  # Absolute, or with its scheme.
    num_bytes: int  # For a table beside its images, this includes an estimate of their size.
    start: int = 0  # Byte offset of a row, or number of a file; start=0 and stop=None mean the whole shard.
    stop: int | None = None
    first_row: int = 0  # Number of rows before `start`.
    follow_links: bool = False  # Whether links may lead out of the folder.
    of_split: bool = False  # Whether its name or folder says that it belongs to the split of --split.


class DroppedSample(Exception):
    """Raised for a sample that is dropped for `reason`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@dataclasses.dataclass(frozen=True)
class OutOfRange:
    """The number of a class that its column's list of classes does not have, as a field's value."""

    number: int


class MapFile(NamedTuple):
    """A second image of a sample: the encoded file's bytes, or None for the reason `absence`."""

    data: bytes | None
    absence: str = "no_image"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image-text pair as the input stores it.

    `image` is the encoded file's bytes, or None for the reason `absence`. `fields` are named as `--caption`, `--label`
    and `--keep` name them (`txt`, `json:name`, a column or key); texts may be bytes, exactly as they were stored.
    `maps` has the second images, named as `--image` names them; one that is left out is missing.
    """

    key: str
    image: bytes | None
    fields: Mapping[str, Any]
    absence: str = "no_image"
    maps: Mapping[str, MapFile] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Samples that the input announced or began but that cannot be read.

    `samples` is their number (0 if unknown), `num_bytes` the size of the skipped input, `key` the first sample's name
    if known.
    """

    reason: str
    samples: int
    num_bytes: int = 0
    key: str | None = None
