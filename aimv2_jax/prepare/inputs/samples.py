"""Input shards, their samples, and counts of input that could not be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

TABLE_CAPTIONS = ("caption", "text", "alt", "TEXT", "alt_text", "description")  # Default caption columns.
MAX_SAMPLES = 10**8  # Per file; larger announced counts are treated as damage.


@dataclasses.dataclass(frozen=True)
class InputShard:
    """Part of the input that is read in sequence: a tar, a parquet file, or rows of a table beside its images."""

    kind: str  # A key of `reader.FORMATS`.
    path: str  # Absolute, or with its scheme.
    num_bytes: int  # For a table beside its images, this includes an estimate of their size.
    start: int = 0  # Byte offset of a row; start=0 and stop=None mean the whole file.
    stop: int | None = None
    first_row: int = 0  # Number of rows before `start`.
    follow_links: bool = False  # Whether links may lead out of the folder.


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image-text pair as the input stores it.

    `image` is the encoded file's bytes, or None for the reason `absence`. `fields` are named as `--caption`, `--label`
    and `--keep` name them (`txt`, `json:name`, a column or key); texts may be bytes, exactly as they were stored.
    """

    key: str
    image: bytes | None
    fields: Mapping[str, Any]
    absence: str = "no_image"


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
