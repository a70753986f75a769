"""Summary of a prepared dataset in lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import MapCount
from aimv2_jax.untrusted import printable

_MAX_LINE_LENGTH = 10_000  # Characters of one line of the report.
_HINTS = {  # Reason of dropped or lost samples -> hint.
    "link_out_of_folder": "give --follow-links to follow such links",
    "decompression_bomb": "an input is read only up to a hundred times its packed size",
    "oversized_file": "images over 256 MiB are not read",
    "path_out_of_folder": "a table names files in its own folder",
    "map_with_colours": "second images have one channel; give a mask of class numbers, not its colours",
    "map_not_png": "second images are PNGs: other formats change the values",
}


def report(info: DatasetInfo) -> str:
    """Multi-line summary of the prepared dataset."""
    lines = [
        f"{info.records:,} records of {info.samples:,} samples in {len(info.shards):,} shards, {info.bytes:,} bytes",
        "captions: " + (", ".join(_caption_counts(info)) or "none"),
    ]
    if info.labels:
        lines.append("labels: " + ", ".join(map(partial(_label_counts, info), info.labels)))
    if info.images:
        lines.append("images: " + ", ".join(map_text(name, count) for name, count in info.images.items()))
    for title, account in (("dropped", info.drops), ("changed", info.changes), ("lost", info.lost)):
        lines += [f"{title}: {line}" for line in count_lines(account)]
    return "\n".join(printable(line, _MAX_LINE_LENGTH) for line in lines)


def map_text(name: str, count: MapCount) -> str:
    """The second images of a name in words."""
    bits = {8: count.bits_8.count, 16: count.bits_16.count}
    kinds = " and ".join(f"{number:,} of {width} bits" for width, number in bits.items() if number)
    return f"{name} {kinds}, values up to {count.max_value}"


def _label_counts(info: DatasetInfo, label: str) -> str:
    classes = info.classes.get(label)
    if classes is None:
        return label
    empty = [name for name, count in classes.items() if not count]
    without = f", {len(empty):,} of them without a record (first: {empty[0]})" if empty else ""
    return f"{label} with {len(classes):,} classes{without}"


def count_lines(*counts_by_reason: Mapping[str, Any]) -> list[str]:
    """One line per entry: its count, its reason and its first key."""
    lines = []
    for reason, entry in (item for counts in counts_by_reason for item in counts.items()):
        count = entry.count if hasattr(entry, "count") else entry.samples
        size = f", {entry.bytes:,} bytes" if hasattr(entry, "bytes") else ""
        first = f" (first: {entry.keys[0]})" if entry.keys else ""
        hint = _HINTS.get(reason.partition(":")[0])
        hint = f"; {hint}" if hint else ""
        lines.append(f"{count:,} {reason}{size}{first}{hint}")
    return lines


def _caption_counts(info: DatasetInfo) -> Iterator[str]:
    for kind, count in info.kinds.items():
        records = info.records_with[kind]
        yield f"{kind} {count:,}" + (f" (of {records:,} records)" if count != records else "")
