"""What a contact sheet shows of a prepared data set, and of a training batch: tiles, facts and histograms.

L patches, P numbers a patch.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from matplotlib.figure import Figure

from aimv2_jax.config import Config, mixture_counts
from aimv2_jax.data import pipeline, records, transforms
from aimv2_jax.data.books import ASPECT, SIDE, Books
from aimv2_jax.data.contact_sheet import (
    LARGEST_PICTURE,
    PICTURE_SIDE,
    Bars,
    Histogram,
    Tile,
    contact_sheet,
    fitted,
    magnified,
)
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.data.pipeline import HostBatch
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.data.tokenizer import Tokenizer

MOST_ROWS = 256  # Of a batch that are read: 8192 would take half a minute, and their histograms look the same.
_MOST_BARS = 20
_MOST_SOURCES = 12


# --- a prepared data set -----------------------------------------------------------------------------------------


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
    texts = dict(record.captions)
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
    facts = {"records": f"{info.records:,} in {_counted(len(info.shards), 'shard')}, {_bytes(info.bytes)}"}
    facts["captions"] = (
        "\n".join(f"{kind}: {_part(count, info.records)}" for kind, count in info.kinds.items()) or "none"
    )
    facts["labels"] = ", ".join(info.labels) or "none"
    if info.format_version == 1:
        facts["left out on the way"] = "not recorded: the set is of format 1"
        return facts
    facts["came in"] = f"{_counted(info.samples, 'sample')}, {info.samples - info.records:,} left out"
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


def _size_charts(source: Source, shown: Sequence[tuple[int, int]]) -> list[Histogram | Bars]:
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
    charts: list[Histogram | Bars] = []
    if counts:
        ticks = {i - 0.5: f"{edge:g}" for i, edge in enumerate(edges) if i % every == 0}
        charts.append(Histogram(f"Shorter side, {whose}", counts, ticks, "pixels"))
    first, counts = _without_empty_ends(aspect.counts)
    middles = [math.sqrt(a * b) for a, b in zip(aspect.edges, aspect.edges[1:])]
    square = min(range(len(middles)), key=lambda i: abs(math.log(middles[i]))) - first
    every = -(-len(counts) // 9)
    if counts:
        ticks = {i: f"{middles[first + i]:.2g}" for i in range(len(counts)) if (i - square) % every == 0}
        charts.append(Histogram(f"Aspect, {whose}", counts, ticks, "width / height"))
    return charts


def _without_empty_ends(counts: Sequence[int]) -> tuple[int, list[int]]:
    """The place of the first count above zero, and the counts from there to the last such."""
    filled = np.flatnonzero(counts)
    return (int(filled[0]), list(counts[filled[0] : filled[-1] + 1])) if len(filled) else (0, [])


# --- a training batch --------------------------------------------------------------------------------------------


def batch_sheet(config: Config, name: str, step: int, most_pictures: int) -> Figure:
    """The first rows of the batch of `step`, as they go to the model."""
    pipeline.check_sources(config)
    decoder = config.model.decoder
    tokenizer = Tokenizer(config.tokenizer.path, decoder.text_length, decoder.vocab_size, config.loss.predict_eos)
    rows = min(MOST_ROWS, config.data.batch_size)
    # Threads of this process: a batch is the same however it is built, and workers would take seconds to start.
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0, prefetch=1))
    plan = pipeline.training_plan(config, pipeline.open_sources(config.data.sources))
    with pipeline.training_batches(single, np.arange(rows), step, tokenizer) as batches:
        batch = next(batches)
    count = min(most_pictures, rows)
    factor = _factor(batch, count, config.model.patch_size)
    tiles = [_row_tile(config, plan, tokenizer, batch, row, factor) for row in range(count)]
    note = f"Rows 0 to {count - 1:,} of {config.data.batch_size:,}, as the model gets them"
    note += {0: ", reduced to fit", 1: ""}.get(factor, f", every pixel drawn as {factor} × {factor}")
    note += "; below them, what their tokens decode to."
    if rows < config.data.batch_size:
        note += f" Counts are of the first {rows:,} rows."
    return contact_sheet(
        tiles, _batch_facts(config, batch), _batch_charts(config, batch), f"{name}, step {step:,}", note
    )


def row_picture(
    patches: UInt8[np.ndarray, "L P"], coords: Int32[np.ndarray, "L 2"], valid: Bool[np.ndarray, " L"], patch_size: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of a row's valid patches, each where `coords` has it; white where there is none."""
    rows, columns = coords[valid].max(axis=0) + 1
    whole = np.full((rows * columns, patches.shape[1]), 255, np.uint8)
    whole[coords[valid, 0] * columns + coords[valid, 1]] = patches[valid]
    return transforms.unpatchify(whole, (int(rows), int(columns)), patch_size)


def _factor(batch: HostBatch, count: int, patch_size: int) -> int:
    """How often the pixels of all pictures are enlarged, so that their sizes compare; 0 where they must be reduced."""
    coords, valid = batch.arrays["coords"][:count], batch.arrays["valid"][:count]
    longest = (int(coords[valid].max(initial=0)) + 1) * patch_size
    return max(1, PICTURE_SIDE // longest) if longest <= LARGEST_PICTURE else 0


def _row_tile(config: Config, plan: Plan, tokenizer: Tokenizer, batch: HostBatch, row: int, factor: int) -> Tile:
    arrays = {name: array[row] for name, array in batch.arrays.items()}
    high, low = arrays["example_index"]
    example = (int(high) << 32) + int(low)
    if not arrays["valid"].any():
        return Tile(f"example {example:,}", "", {}, problem="filling")
    pixels = row_picture(arrays["patches"], arrays["coords"], arrays["valid"], config.model.patch_size)
    rows, columns = (size // config.model.patch_size for size in pixels.shape[:2])
    draw = plan.draw(example)
    subtitle = f"{draw.source} · {draw.kind}"
    tokens = arrays["tokens"][arrays["token_valid"]]
    label = f"{rows} × {columns} patches · {_counted(len(tokens), 'token')}"
    if tokenizer.unk_id is not None and (unknown := int((tokens == tokenizer.unk_id).sum())):
        label += f", {unknown} unknown"
    if len(tokens) == tokenizer.length - 1:
        label += ", no more fit"
    texts = {label: tokenizer.decode(tokens)}
    faults = [fault for fault in batch.faults if fault.example == example]
    if faults:
        texts["in place of"] = ", ".join(
            f"{fault.key or f'record {fault.record:,}'}: {fault.reason}" for fault in faults
        )
    picture = magnified(pixels, factor) if factor else fitted(pixels, LARGEST_PICTURE)
    return Tile(f"example {example:,}", subtitle, texts, picture)


def _batch_facts(config: Config, batch: HostBatch) -> dict[str, str]:
    first = batch.step * config.data.batch_size
    facts = {"batch": f"examples {first:,} to {first + config.data.batch_size - 1:,}"}
    counts = mixture_counts(config.data.mixture)
    total = sum(count for kinds in counts.values() for count in kinds.values())
    facts["mixture asked"] = "\n".join(
        f"{name}: " + ", ".join(f"{kind} {100 * count / total:.3g} %" for kind, count in kinds.items() if count)
        for name, kinds in counts.items()
    )
    reasons = collections.Counter(fault.reason for fault in batch.faults)
    facts["unusable records met"] = "\n".join(f"{reason}: {n:,}" for reason, n in sorted(reasons.items())) or "none"
    return facts


def _batch_charts(config: Config, batch: HostBatch) -> list[Histogram | Bars]:
    used = batch.arrays["valid"].any(axis=1)
    patches = batch.arrays["valid"][used].sum(axis=1)
    tokens = batch.arrays["token_valid"][used].sum(axis=1)
    names = list(config.data.sources)
    sources = collections.Counter(dict.fromkeys(names, 0))
    sources.update(names[place] for place in batch.arrays["source"][used])
    ordered = sources.most_common()
    shown = dict(ordered[:_MOST_SOURCES])
    if rest := ordered[_MOST_SOURCES:]:
        shown[f"{len(rest)} others"] = sum(count for _, count in rest)
    return [
        Bars("Rows by source", shown),
        _whole_numbers("Tokens a row", tokens, f"text tokens, of {config.model.decoder.text_length} with the end"),
        _whole_numbers("Patches a row", patches, "valid patches"),
    ]


def _whole_numbers(title: str, values: np.ndarray, note: str) -> Histogram:
    """A histogram of whole numbers; a bar each where that makes few bars."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MOST_BARS)
    counts = np.bincount((values - low) // width)
    places = range(len(counts))
    texts = [str(low + width * i) if width == 1 else f"{low + width * i}–{low + width * (i + 1) - 1}" for i in places]
    every = -(-sum(map(len, texts)) // 36)
    return Histogram(title, counts.tolist(), {i: texts[i] for i in places if i % every == 0}, note)


# --- numbers in words --------------------------------------------------------------------------------------------


def _first(keys: Sequence[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _part(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g} %)"


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
