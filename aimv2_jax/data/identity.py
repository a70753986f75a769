"""What a run is trained on, told apart: the records of its sources, and its tokenizer.

Which example has which record follows from the number of records; folders and files may move and be copied. So a
source is known by what `dataset.json` says of its shards (records and bytes of each, in order) and by the content of
a few records. All of it is JSON, so that a checkpoint can hold it and processes can exchange it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import StorageError

TOKENIZER = "tokenizer"
_SAMPLED = 16  # Records of a source: the first, the last, and others at equal distances.
_LETTERS = 16  # Of a digest in hexadecimal.


def identify(sources: Mapping[str, Source], tokenizer: str) -> dict[str, Any]:
    """The identity of the data and of the tokenizer, whose digest is given."""
    return {TOKENIZER: tokenizer[:_LETTERS], "sources": {name: _identify(source) for name, source in sources.items()}}


def digest(identity: Mapping[str, Any]) -> str:
    """A short name of an identity, for a command line."""
    return _digest(json.dumps(identity, sort_keys=True).encode())[:8]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What differs: "the tokenizer" or "data source 'NAME'", and how either side can be described.

    A record that either side cannot read, and a source that only one side has, is no difference.
    """
    if one[TOKENIZER] != other[TOKENIZER]:
        yield "the tokenizer", f"digest {one[TOKENIZER]}", f"digest {other[TOKENIZER]}"
    for name, source in one["sources"].items():
        if name in other["sources"]:
            described = _described(source, other["sources"][name])
            if described:
                yield f"data source {name!r}", *described


def _identify(source: Source) -> dict[str, Any]:
    shards, count = source.info.shards, len(source)
    picks = sorted({place * (count - 1) // (_SAMPLED - 1) for place in range(_SAMPLED)})

    failures: list[StorageError] = []

    def digest_of(index: int) -> str | None:
        try:
            return _digest(source.read(index))
        except BadRecord:  # The run replaces it; a copy on another host may be whole.
            return None
        except StorageError as error:
            failures.append(error)
            return None

    with ThreadPoolExecutor(_SAMPLED) as pool:
        sampled = dict(zip(map(str, picks), pool.map(digest_of, picks), strict=True))
    if len(failures) == len(picks):  # Not a file that is broken: the storage is away.
        raise failures[0]
    return {
        "records": count,
        "shards": len(shards),
        "layout": _digest(json.dumps([[shard.records, shard.bytes] for shard in shards]).encode()),
        "sampled": sampled,
    }


def _described(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first difference, as either side has it."""
    for key in ("records", "shards"):
        if one[key] != other[key]:
            return f"{one[key]:,} {key}", f"{other[key]:,} {key}"
    if one["layout"] != other["layout"]:
        return f"sizes of shards {one['layout']}", f"sizes of shards {other['layout']}"
    for index, content in one["sampled"].items():
        theirs = other["sampled"].get(index)
        if content and theirs and content != theirs:
            return f"record {index} with digest {content}", f"record {index} with digest {theirs}"
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_LETTERS]
