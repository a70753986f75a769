"""Contact sheet of a training batch: its rows as the model gets them. L patches, P values per patch."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from matplotlib.figure import Figure

from aimv2_jax.config import Config, mixture_counts
from aimv2_jax.data import pipeline
from aimv2_jax.data.inspect.charts import BarChart, NameChart
from aimv2_jax.data.inspect.sheet import IMAGE_SIDE, MAX_IMAGE_SIDE, Tile, contact_sheet, fitted, magnified
from aimv2_jax.data.pipeline import HostBatch
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.data.transforms import geometry
from aimv2_jax.plotting import Pixels, counted

MAX_ROWS = 256  # Rows of a batch that are read: 8192 would take half a minute, with similar histograms.
_MAX_BARS = 20
_MAX_SOURCES = 12


def batch_sheet(config: Config, name: str, step: int, max_images: int) -> Figure:
    """The first rows of the batch of `step` as the model gets them, with the text decoded from their tokens.

    Beside them: the configured mixture, and counts of sources, tokens and patches over up to `MAX_ROWS` rows.

    Raises:
      UserError: if a source or the tokenizer of `config` cannot be used.
    """
    pipeline.check_sources(config)
    decoder = config.model.decoder
    tokenizer = Tokenizer(config.tokenizer.path, decoder.text_length, decoder.vocab_size, config.loss.predict_eos)
    # Built by threads of this process: the batch is the same, and workers would take seconds to start.
    without_workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0, prefetch=1))
    sampler = pipeline.training_sampler(config, pipeline.open_sources(config.data.sources))
    size = sampler.schedule.shape(step).examples
    rows = min(MAX_ROWS, size)
    with pipeline.training_batches(without_workers, lambda _: range(rows), step, tokenizer) as batches:
        batch = next(batches)
    count = min(max_images, rows)
    factor = _factor(batch, count, config.model.patch_size)
    tiles = [_row_tile(config, sampler, tokenizer, batch, row, factor) for row in range(count)]
    note = f"Rows 0 to {count - 1:,} of {size:,}, as the model gets them"
    note += {0: ", reduced to fit", 1: ""}.get(factor, f", every pixel drawn as {factor} × {factor}")
    note += "; below them, the text decoded from their tokens."
    if rows < size:
        note += f" Counts are of the first {rows:,} rows."
    return contact_sheet(
        tiles, _batch_facts(config, sampler, batch), _batch_charts(config, batch), f"{name}, step {step:,}", note
    )


def row_image(
    patches: UInt8[np.ndarray, "L P"], coords: Int32[np.ndarray, "L 2"], valid: Bool[np.ndarray, " L"], patch_size: int
) -> Pixels:
    """The image of a row's valid patches, placed by `coords`; white where there is none."""
    rows, columns = coords[valid].max(axis=0) + 1
    full_grid = np.full((rows * columns, patches.shape[1]), 255, np.uint8)
    full_grid[coords[valid, 0] * columns + coords[valid, 1]] = patches[valid]
    return geometry.unpatchify(full_grid, (int(rows), int(columns)), patch_size)


def _factor(batch: HostBatch, count: int, patch_size: int) -> int:
    """Common magnification of all images, so that their sizes compare; 0 if they must be reduced."""
    coords, valid = batch.arrays["coords"][:count], batch.arrays["valid"][:count]
    longest = (int(coords[valid].max(initial=0)) + 1) * patch_size
    return max(1, IMAGE_SIDE // longest) if longest <= MAX_IMAGE_SIDE else 0


def _row_tile(
    config: Config, sampler: MixtureSampler, tokenizer: Tokenizer, batch: HostBatch, row: int, factor: int
) -> Tile:
    arrays = {name: array[row] for name, array in batch.arrays.items()}
    high, low = arrays["example_index"]
    example = (int(high) << 32) + int(low)
    if not arrays["valid"].any():
        return Tile(f"example {example:,}", "", {}, problem="padding")
    pixels = row_image(arrays["patches"], arrays["coords"], arrays["valid"], config.model.patch_size)
    rows, columns = (size // config.model.patch_size for size in pixels.shape[:2])
    draw = sampler.draw(example)
    subtitle = f"{draw.source} · {draw.kind}"
    tokens = arrays["tokens"][arrays["token_valid"]]
    label = f"{rows} × {columns} patches · {counted(len(tokens), 'token')}"
    if tokenizer.unk_id is not None and (unknown := int((tokens == tokenizer.unk_id).sum())):
        label += f", {unknown} unknown"
    if arrays["truncated"]:
        label += ", no more fit"
    texts = {label: tokenizer.decode(tokens)}
    faults = [fault for fault in batch.faults if fault.example == example]
    if faults:
        texts["in place of"] = ", ".join(
            f"{fault.key or f'record {fault.record:,}'}: {fault.reason}" for fault in faults
        )
    image = magnified(pixels, factor) if factor else fitted(pixels, MAX_IMAGE_SIDE)
    return Tile(f"example {example:,}", subtitle, texts, image)


def _batch_facts(config: Config, sampler: MixtureSampler, batch: HostBatch) -> dict[str, str]:
    first, end = (sampler.schedule.first_example(step) for step in (batch.step, batch.step + 1))
    facts = {"batch": f"examples {first:,} to {end - 1:,}"}
    if config.data.areas:
        facts["patches"] = f"at most {batch.arrays['valid'].shape[1]:,} each, {batch.arrays['valid'].mean():.1%} used"
    counts = mixture_counts(config.data.mixture)
    total = sum(count for kinds in counts.values() for count in kinds.values())
    facts["mixture asked"] = "\n".join(
        f"{name}: " + ", ".join(f"{kind} {100 * count / total:.3g} %" for kind, count in kinds.items() if count)
        for name, kinds in counts.items()
    )
    truncated = int(batch.arrays["truncated"].sum())
    facts["captions cut to fit"] = f"{truncated:,} of {counted(len(batch.arrays['truncated']), 'row')}"
    reasons = collections.Counter(fault.reason for fault in batch.faults)
    facts["unusable records met"] = "\n".join(f"{reason}: {n:,}" for reason, n in sorted(reasons.items())) or "none"
    return facts


def _batch_charts(config: Config, batch: HostBatch) -> list[BarChart | NameChart]:
    used = batch.arrays["valid"].any(axis=1)
    patches = batch.arrays["valid"][used].sum(axis=1)
    tokens = batch.arrays["token_valid"][used].sum(axis=1)
    names = list(config.data.sources)
    sources = collections.Counter(dict.fromkeys(names, 0))
    sources.update(names[index] for index in batch.arrays["source"][used])
    ordered = sources.most_common()
    shown = dict(ordered[:_MAX_SOURCES])
    if rest := ordered[_MAX_SOURCES:]:
        shown[f"{len(rest)} others"] = sum(count for _, count in rest)
    return [
        NameChart("Rows by source", shown),
        _integer_histogram("Tokens a row", tokens, f"text tokens, of {config.model.decoder.text_length} with the end"),
        _integer_histogram("Patches a row", patches, "valid patches"),
    ]


def _integer_histogram(title: str, values: np.ndarray, note: str) -> BarChart:
    """Histogram of integers, with one bar per value if the range is small."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MAX_BARS)
    counts = np.bincount((values - low) // width)
    bars = range(len(counts))
    texts = [str(low + width * i) if width == 1 else f"{low + width * i}–{low + width * (i + 1) - 1}" for i in bars]
    tick_step = -(-sum(map(len, texts)) // 36)
    return BarChart(title, counts.tolist(), {i: texts[i] for i in bars if i % tick_step == 0}, note)
