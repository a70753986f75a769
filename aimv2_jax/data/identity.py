"""Fingerprint of a run's data: the records of its sources, and its tokenizer.

The number of records decides which example has which record; folders and files may be moved and copied. So a source is
identified by its shards in `dataset.json` (records and bytes of each, in order) and by the content of a few records.
The identity is JSON: checkpoints store it and processes exchange it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aimv2_jax.data.records import BadRecord, is_intact
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import StorageError

TOKENIZER = "tokenizer"
_NUM_SAMPLED = 16  # Records hashed per source: the first, the last, and others at equal distances.
_DIGEST_LETTERS = 16  # Hexadecimal digits of a digest.


def identify(sources: Mapping[str, Source], tokenizer: str) -> dict[str, Any]:
    """The identity of the sources and of the tokenizer, given the tokenizer's digest."""
    return {
        TOKENIZER: tokenizer[:_DIGEST_LETTERS],
        "sources": {name: _identify(source) for name, source in sources.items()},
    }


def digest(identity: Mapping[str, Any]) -> str:
    """A short digest of an identity, for a command line."""
    return _digest(json.dumps(identity, sort_keys=True).encode())[:8]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Differences of two identities: "the tokenizer" or "data source 'NAME'", and a description of each side.

    A record that either side cannot read, and a source that only one side has, is not a difference.
    """
    if first[TOKENIZER] != second[TOKENIZER]:
        yield "the tokenizer", f"digest {first[TOKENIZER]}", f"digest {second[TOKENIZER]}"
    for name, source in first["sources"].items():
        if name in second["sources"]:
            difference = _source_difference(source, second["sources"][name])
            if difference:
                yield f"data source {name!r}", *difference


def _identify(source: Source) -> dict[str, Any]:
    shards, count = source.info.shards, len(source)
    indices = sorted({i * (count - 1) // (_NUM_SAMPLED - 1) for i in range(_NUM_SAMPLED)})

    failures: list[StorageError] = []

    def digest_of(index: int) -> str | None:
        try:
            data = source.read(index)
        except BadRecord:
            return None
        except StorageError as error:
            failures.append(error)
            return None
        # Training replaces a damaged record; the copy on another host may be intact.
        return _digest(data) if is_intact(data) else None

    with ThreadPoolExecutor(_NUM_SAMPLED) as pool:
        sampled = dict(zip(map(str, indices), pool.map(digest_of, indices), strict=True))
    if len(failures) == len(indices):  # The storage is unavailable, not a single file.
        raise failures[0]
    return {
        "records": count,
        "shards": len(shards),
        "layout": _digest(json.dumps([[shard.records, shard.bytes] for shard in shards]).encode()),
        "sampled": sampled,
    }


def _source_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first difference between two identities of a source, as a description of each side."""
    for key in ("records", "shards"):
        if first[key] != second[key]:
            return f"{first[key]:,} {key}", f"{second[key]:,} {key}"
    if first["layout"] != second["layout"]:
        return f"sizes of shards {first['layout']}", f"sizes of shards {second['layout']}"
    for index, first_digest in first["sampled"].items():
        second_digest = second["sampled"].get(index)
        if first_digest and second_digest and first_digest != second_digest:
            return f"record {index} with digest {first_digest}", f"record {index} with digest {second_digest}"
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_LETTERS]
