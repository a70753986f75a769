"""Contact sheet of a prepared dataset: its records, and the counts of its dataset.json."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from aimv2_jax.data import records
from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.dataset_stats import ASPECT, SIDE, DatasetStats
from aimv2_jax.data.inspect.charts import BarChart
from aimv2_jax.data.inspect.sheet import Tile, contact_sheet, fitted
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.plotting import counted

_MAX_CAPTIONS = 3  # Captions shown per kind and record.


def dataset_sheet(source: Source, name: str, max_images: int) -> Figure:
    """Images spread evenly over the dataset, and the counts of its dataset.json."""
    count = min(max_images, len(source))
    indices = [int(index) for index in np.linspace(0, len(source) - 1, count).round()]
    shown = [_record_tile(source, index) for index in indices]
    bad = sum(tile.image is None for tile, _ in shown)
    note = f"{count:,} of {len(source):,} records, spread evenly; large ones reduced, small ones enlarged"
    note += f"; {bad:,} of these cannot be used" if bad else ""
    charts = _size_charts(source, [size for _, size in shown if size])
    return contact_sheet([tile for tile, _ in shown], _dataset_facts(source), charts, f"Dataset {name}", note)


def _record_tile(source: Source, index: int) -> tuple[Tile, tuple[int, int] | None]:
    """The tile of a record, and the width and height of its image."""
    position = f"record {index:,}"
    try:
        record = records.decode(source.read(index))
    except BadRecord as error:
        return Tile(error.key or position, position if error.key else "", {}, problem=error.reason), None
    texts = {}
    for kind in record.captions:
        captions = record.texts(kind)
        for number, text in enumerate(captions[:_MAX_CAPTIONS], 1):
            texts[kind if len(captions) == 1 else f"{kind}, {number} of {len(captions):,}"] = text
    if record.labels:
        texts["labels"] = ", ".join(f"{name} = {value}" for name, value in record.labels.items())
    try:
        image = decode_image(record.image)
    except BadRecord as error:
        return Tile(record.key, f"{position} · {_format_bytes(len(record.image))}", texts, problem=error.reason), None
    width, height = image.size
    subtitle = f"{position} · {width} × {height} · {_format_bytes(len(record.image))}"
    return Tile(record.key, subtitle, texts, fitted(np.asarray(image))), image.size


def _dataset_facts(source: Source) -> dict[str, str]:
    info = source.info
    facts = {"records": f"{info.records:,} in {counted(len(info.shards), 'shard')}, {_format_bytes(info.bytes)}"}
    facts["captions"] = "\n".join(f"{kind}: {_caption_counts(info, kind)}" for kind in info.kinds) or "none"
    facts["labels"] = ", ".join(info.labels) or "none"
    if info.format_version == 1:
        facts["dropped"] = "not recorded: the dataset has format 1"
        return facts
    facts["input"] = f"{counted(info.samples, 'sample')}, {info.samples - info.records:,} dropped or lost"
    for title, entries in (("dropped", info.drops), ("changed", info.changes)):
        if entries:
            facts[title] = "\n".join(
                f"{reason}: {drop.count:,}{_first_key(drop.keys)}" for reason, drop in entries.items()
            )
    if info.lost:
        facts["lost"] = "\n".join(
            f"{reason}: {lost.samples:,}, {_format_bytes(lost.bytes)}" for reason, lost in info.lost.items()
        )
    return facts


def _size_charts(source: Source, shown: Sequence[tuple[int, int]]) -> list[BarChart]:
    """Size histograms from dataset.json, or of the (width, height) of the images `shown` if it has none."""
    histograms = source.info.histograms
    scope = "all records"
    if not histograms:
        stats = DatasetStats()
        for size in shown:
            stats.keep({}, {}, size)
        histograms = stats.histograms
        scope = f"the {len(shown):,} shown"
    side, aspect = histograms[SIDE], histograms[ASPECT]
    first, counts = _trim_zeros(side.counts)
    edges = side.edges[first : first + len(counts) + 1]
    tick_step = -(-len(edges) // 9)
    charts: list[BarChart] = []
    if counts:
        ticks = {i - 0.5: f"{edge:g}" for i, edge in enumerate(edges) if i % tick_step == 0}
        charts.append(BarChart(f"Shorter side, {scope}", counts, ticks, "pixels"))
    first, counts = _trim_zeros(aspect.counts)
    middles = [math.sqrt(a * b) for a, b in zip(aspect.edges, aspect.edges[1:])]
    square = min(range(len(middles)), key=lambda i: abs(math.log(middles[i]))) - first
    tick_step = -(-len(counts) // 9)
    if counts:
        ticks = {i: f"{middles[first + i]:.2g}" for i in range(len(counts)) if (i - square) % tick_step == 0}
        charts.append(BarChart(f"Aspect, {scope}", counts, ticks, "width / height"))
    return charts


def _trim_zeros(counts: Sequence[int]) -> tuple[int, list[int]]:
    """The index of the first non-zero count, and the counts from there to the last non-zero one."""
    filled = np.flatnonzero(counts)
    return (int(filled[0]), list(counts[filled[0] : filled[-1] + 1])) if len(filled) else (0, [])


def _first_key(keys: Sequence[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""


def _caption_counts(info: DatasetInfo, kind: str) -> str:
    captions, records = info.kinds[kind], info.records_with[kind]
    return _with_percent(records, info.records) + (f", {captions:,} captions" if captions != records else "")


def _with_percent(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g} %)"


def _format_bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
