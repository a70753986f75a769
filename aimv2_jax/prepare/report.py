"""Summary of a prepared dataset in lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.untrusted import printable

_MAX_LINE_LENGTH = 10_000  # Characters of one line of the report.
_HINTS = {  # Reason of dropped or lost samples -> hint.
    "link_out_of_folder": "give --follow-links to follow such links",
    "decompression_bomb": "an input is read only up to a hundred times its packed size",
    "oversized_file": "images over 256 MiB are not read",
}


def report(info: DatasetInfo) -> str:
    """Multi-line summary of the prepared dataset."""
    lines = [
        f"{info.records:,} records of {info.samples:,} samples in {len(info.shards):,} shards, {info.bytes:,} bytes",
        "captions: " + ", ".join(_caption_counts(info)),
    ]
    if info.labels:
        lines.append("labels: " + ", ".join(info.labels))
    for title, account in (("dropped", info.drops), ("changed", info.changes), ("lost", info.lost)):
        lines += [f"{title}: {line}" for line in count_lines(account)]
    return "\n".join(printable(line, _MAX_LINE_LENGTH) for line in lines)


def count_lines(*counts_by_reason: Mapping[str, Any]) -> list[str]:
    """One line per entry: its count, its reason and its first key."""
    lines = []
    for reason, entry in (item for counts in counts_by_reason for item in counts.items()):
        count = entry.count if hasattr(entry, "count") else entry.samples
        size = f", {entry.bytes:,} bytes" if hasattr(entry, "bytes") else ""
        first = f" (first: {entry.keys[0]})" if entry.keys else ""
        hint = f"; {_HINTS[reason]}" if reason in _HINTS else ""
        lines.append(f"{count:,} {reason}{size}{first}{hint}")
    return lines


def _caption_counts(info: DatasetInfo) -> Iterator[str]:
    for kind, count in info.kinds.items():
        records = info.records_with[kind]
        yield f"{kind} {count:,}" + (f" (of {records:,} records)" if count != records else "")
