"""Parts of the input and what they give: samples, and an account of what could not be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_SAMPLES = 10**8  # Of a file: whatever announces more is not true.


@dataclasses.dataclass(frozen=True)
class InputShard:
    """A part of the input that is read in one go: a tar, a parquet file, or rows of a table beside its pictures."""

    kind: str  # One of `kinds.KINDS`.
    path: str  # Absolute, or with its scheme.
    num_bytes: int  # For tables beside pictures with an estimate of these.
    start: int = 0  # Bytes, where a row begins; 0 and None mean the whole file.
    stop: int | None = None
    first_row: int = 0  # How many come before `start`.
    follow_links: bool = False  # Whether links may lead out of the folder.


@dataclasses.dataclass(frozen=True)
class Sample:
    """One pair as its input holds it.

    `image` is the encoded file's bytes, None where there is none, for the reason `absence`. `fields` are named as
    `--caption`, `--label` and `--keep` name them (`txt`, `json:name`, a column or key); texts may still be bytes,
    exactly as they were stored.
    """

    key: str
    image: bytes | None
    fields: Mapping[str, Any]
    absence: str = "no_image"


@dataclasses.dataclass(frozen=True)
class Damage:
    """Samples that the input announced or began and that cannot be given.

    `samples` is how many (0 where nobody can know), `num_bytes` how much of the input was passed over, `key` the first
    of them where it has a name.
    """

    reason: str
    samples: int
    num_bytes: int = 0
    key: str | None = None
