"""Contact sheet of a prepared dataset: its records, and the counts of its dataset.json."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from aimv2_jax.data import records
from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import ASPECT, SIDE
from aimv2_jax.data.inspect.maps import drawn_maps, side_by_side
from aimv2_jax.data.inspect.sheet import BarChart, Tile, contact_sheet, fitted
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.plotting import counted

_MAX_CAPTIONS = 3  # Captions shown per kind and record.


def dataset_sheet(source: Source, name: str, max_images: int, index: str = "not checked") -> Figure:
    """Draws images spread evenly over the dataset, the counts of its dataset.json, and what its `index` is like."""
    count = min(max_images, len(source))
    tiles = [_record_tile(source, int(index)) for index in np.linspace(0, len(source) - 1, count).round()]
    bad = sum(tile.image is None for tile in tiles)
    note = f"{count:,} of {len(source):,} records, spread evenly; large ones downscaled, small ones upscaled"
    note += f"; {bad:,} of these cannot be used" if bad else ""
    facts = _dataset_facts(source.info) | {"index": [index]}
    return contact_sheet(tiles, facts, _size_charts(source.info), f"Dataset {name}", note)


def _record_tile(source: Source, index: int) -> Tile:
    position = f"record {index:,}"
    try:
        record = records.decode(source.read(index))
    except BadRecord as error:
        return Tile(error.key or position, position if error.key else "", {}, problem=error.reason)
    texts = {}
    for kind in record.captions:
        captions = record.texts(kind)
        for number, text in enumerate(captions[:_MAX_CAPTIONS], 1):
            texts[kind if len(captions) == 1 else f"{kind}, {number} of {len(captions):,}"] = [text]
    if record.labels:
        texts["labels"] = [", ".join(f"{name} = {value}" for name, value in record.labels.items())]
    file_size = _format_bytes(len(record.image))
    try:
        image = decode_image(record.image)
    except BadRecord as error:
        return Tile(record.key, f"{position} · {file_size}", texts, problem=error.reason)
    width, height = image.size
    greatest = {name: count.max_value for name, count in source.info.images.items()}
    maps, lines = drawn_maps(record, greatest)
    if lines:
        texts["second images"] = lines
    pixels = side_by_side([fitted(np.asarray(image)), *maps])
    return Tile(record.key, f"{position} · {width} × {height} · {file_size}", texts, pixels)


def _dataset_facts(info: DatasetInfo) -> dict[str, list[str]]:
    captions = []
    for kind, count in info.kinds.items():
        with_kind = info.records_with[kind]
        several = f", {count:,} captions" if count != with_kind else ""
        captions.append(f"{kind}: {with_kind:,} ({100 * with_kind / info.records:.3g} %){several}")
    facts = {
        "records": [f"{info.records:,} in {counted(len(info.shards), 'shard')}, {_format_bytes(info.bytes)}"],
        "captions": captions or ["none"],
        "labels": [", ".join(map(partial(_label_text, info), info.labels)) or "none"],
    }
    if info.images:
        facts["second images"] = [
            f"{name}: {count.records:,}, values up to {count.max_value}" for name, count in info.images.items()
        ]
    facts["input"] = [f"{counted(info.samples, 'sample')}, {info.samples - info.records:,} dropped or lost"]
    for title, entries in (("dropped", info.drops), ("changed", info.changes)):
        if entries:
            facts[title] = [
                f"{reason}: {drop.count:,}" + (f" (first: {drop.keys[0]})" if drop.keys else "")
                for reason, drop in entries.items()
            ]
    if info.lost:
        facts["lost"] = [
            f"{reason}: {lost.samples:,}, {_format_bytes(lost.bytes)}" for reason, lost in info.lost.items()
        ]
    return facts


def _label_text(info: DatasetInfo, label: str) -> str:
    return f"{label} ({len(info.classes[label]):,} classes)" if label in info.classes else label


def _size_charts(info: DatasetInfo) -> list[BarChart]:
    """Returns histograms of the sizes of all images, without empty bins at the ends."""
    charts = []
    for title, name, note, label in (
        ("Shorter side", SIDE, "pixels", lambda low, high: f"{low:g}–{high - 1:g}"),
        ("Aspect", ASPECT, "width / height", lambda low, high: f"{math.sqrt(low * high):.2g}"),
    ):
        histogram = info.histograms[name]
        labels = [label(low, high) for low, high in itertools.pairwise(histogram.edges)]
        filled = np.flatnonzero(histogram.counts)
        if len(filled):
            bins = slice(filled[0], filled[-1] + 1)
            charts.append(BarChart(f"{title}, all records", labels[bins], histogram.counts[bins], note))
    return charts


def _format_bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
