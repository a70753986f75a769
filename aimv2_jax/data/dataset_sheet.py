"""What a contact sheet shows of a prepared data set: its records, and the accounts of its dataset.json."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from aimv2_jax.data import records
from aimv2_jax.data.books import ASPECT, SIDE, Books
from aimv2_jax.data.charts import BarChart
from aimv2_jax.data.contact_sheet import Tile, contact_sheet, fitted
from aimv2_jax.data.datasets import DatasetInfo
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.drawing import counted

_MOST_CAPTIONS = 3  # Of a kind, that are shown of a record.


def dataset_sheet(source: Source, name: str, most_pictures: int) -> Figure:
    """Pictures spread evenly over the set, and what its dataset.json counts."""
    count = min(most_pictures, len(source))
    places = [int(place) for place in np.linspace(0, len(source) - 1, count).round()]
    shown = [_record_tile(source, place) for place in places]
    bad = sum(tile.picture is None for tile, _ in shown)
    note = f"{count:,} of {len(source):,} records, spread evenly; large ones reduced, small ones enlarged"
    note += f"; {bad:,} of these cannot be used" if bad else ""
    charts = _size_charts(source, [size for _, size in shown if size])
    return contact_sheet([tile for tile, _ in shown], _dataset_facts(source), charts, f"Data set {name}", note)


def _record_tile(source: Source, place: int) -> tuple[Tile, tuple[int, int] | None]:
    """The tile of a record, and the width and height of its picture."""
    where = f"record {place:,}"
    try:
        record = records.decode(source.read(place))
    except BadRecord as error:
        return Tile(error.key or where, where if error.key else "", {}, problem=error.reason), None
    texts = {}
    for kind in record.captions:
        several = record.texts(kind)
        for number, text in enumerate(several[:_MOST_CAPTIONS], 1):
            texts[kind if len(several) == 1 else f"{kind}, {number} of {len(several):,}"] = text
    if record.labels:
        texts["labels"] = ", ".join(f"{name} = {value}" for name, value in record.labels.items())
    try:
        image = decode_image(record.image)
    except BadRecord as error:
        return Tile(record.key, f"{where} · {_bytes(len(record.image))}", texts, problem=error.reason), None
    width, height = image.size
    subtitle = f"{where} · {width} × {height} · {_bytes(len(record.image))}"
    return Tile(record.key, subtitle, texts, fitted(np.asarray(image))), image.size


def _dataset_facts(source: Source) -> dict[str, str]:
    info = source.info
    facts = {"records": f"{info.records:,} in {counted(len(info.shards), 'shard')}, {_bytes(info.bytes)}"}
    facts["captions"] = "\n".join(f"{kind}: {_captions(info, kind)}" for kind in info.kinds) or "none"
    facts["labels"] = ", ".join(info.labels) or "none"
    if info.format_version == 1:
        facts["left out on the way"] = "not recorded: the set is of format 1"
        return facts
    facts["came in"] = f"{counted(info.samples, 'sample')}, {info.samples - info.records:,} left out"
    for title, entries in (("dropped", info.drops), ("changed", info.changes)):
        if entries:
            facts[title] = "\n".join(
                f"{reason}: {tally.count:,}{_first(tally.keys)}" for reason, tally in entries.items()
            )
    if info.lost:
        facts["lost"] = "\n".join(
            f"{reason}: {loss.samples:,}, {_bytes(loss.bytes)}" for reason, loss in info.lost.items()
        )
    return facts


def _size_charts(source: Source, shown: Sequence[tuple[int, int]]) -> list[BarChart]:
    """Histograms of all pictures as dataset.json has them, or else of the (width, height) of those `shown`."""
    recorded, whose = source.info.histograms, "all records"
    if not recorded:
        books = Books()
        for size in shown:
            books.keep({}, {}, size)
        recorded, whose = books.histograms, f"the {len(shown):,} shown"
    side, aspect = recorded[SIDE], recorded[ASPECT]
    first, counts = _without_empty_ends(side.counts)
    edges = side.edges[first : first + len(counts) + 1]
    every = -(-len(edges) // 9)
    charts: list[BarChart] = []
    if counts:
        ticks = {i - 0.5: f"{edge:g}" for i, edge in enumerate(edges) if i % every == 0}
        charts.append(BarChart(f"Shorter side, {whose}", counts, ticks, "pixels"))
    first, counts = _without_empty_ends(aspect.counts)
    middles = [math.sqrt(a * b) for a, b in zip(aspect.edges, aspect.edges[1:])]
    square = min(range(len(middles)), key=lambda i: abs(math.log(middles[i]))) - first
    every = -(-len(counts) // 9)
    if counts:
        ticks = {i: f"{middles[first + i]:.2g}" for i in range(len(counts)) if (i - square) % every == 0}
        charts.append(BarChart(f"Aspect, {whose}", counts, ticks, "width / height"))
    return charts


def _without_empty_ends(counts: Sequence[int]) -> tuple[int, list[int]]:
    """The place of the first count above zero, and the counts from there to the last such."""
    filled = np.flatnonzero(counts)
    return (int(filled[0]), list(counts[filled[0] : filled[-1] + 1])) if len(filled) else (0, [])


def _first(keys: Sequence[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""


def _captions(info: DatasetInfo, kind: str) -> str:
    captions, records = info.kinds[kind], info.records_with[kind]
    return _part(records, info.records) + (f", {captions:,} captions" if captions != records else "")


def _part(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g} %)"


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
