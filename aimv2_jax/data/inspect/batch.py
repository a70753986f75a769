"""Contact sheet of a training batch: its rows as the model gets them. L patches, P values per patch."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from matplotlib.figure import Figure

from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data import pipeline
from aimv2_jax.data.inspect.sheet import IMAGE_SIDE, MAX_IMAGE_SIDE, BarChart, Tile, contact_sheet, fitted, magnified
from aimv2_jax.data.pipeline import HostBatch
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.tokenizer import Tokenizer, load_tokenizer
from aimv2_jax.data.transforms import geometry
from aimv2_jax.plotting import Pixels, counted

MAX_ROWS = 256  # Rows of a batch that are read: 8192 would take half a minute, with similar histograms.
_MAX_BARS = 20


def batch_sheet(config: Config, name: str, step: int, max_images: int) -> Figure:
    """The first rows of the batch of `step` as the model gets them, with the text decoded from their tokens.

    Beside them: the configured mixture, and counts of sources, tokens and patches over up to `MAX_ROWS` rows.

    Raises:
      UserError: if a source or the tokenizer of `config` cannot be used.
    """
    sources = pipeline.open_sources(config).training
    tokenizer = load_tokenizer(config)
    # Built by threads of this process: the batch is the same, and workers would take seconds to start.
    without_workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0, prefetch=1))
    sampler = pipeline.training_sampler(config, sources)
    size = sampler.schedule.shape(step).examples
    rows = min(MAX_ROWS, size)
    with pipeline.training_batches(without_workers, lambda _: range(rows), step, tokenizer, sources=sources) as batches:
        batch = next(batches)
    count = min(max_images, rows)
    factor = _factor(batch, count, config.model.patch_size)
    tiles = [_row_tile(config, sampler, tokenizer, batch, row, factor) for row in range(count)]
    note = f"Rows 0 to {count - 1:,} of {size:,}, as the model gets them"
    note += {0: ", reduced to fit", 1: ""}.get(factor, f", every pixel drawn as {factor} × {factor}")
    note += "; below them, the text decoded from their tokens."
    if rows < size:
        note += f" Counts are of the first {rows:,} rows."
    tokens, patches = (batch.arrays[name].sum(axis=1) for name in ("token_valid", "valid"))
    charts = [
        _integer_histogram("Tokens a row", tokens, f"text tokens, of {tokenizer.length} with the end"),
        _integer_histogram("Patches a row", patches, "valid patches"),
    ]
    return contact_sheet(tiles, _batch_facts(config, sampler, batch), charts, f"{name}, step {step:,}", note)


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
    longest = (int(coords[valid].max()) + 1) * patch_size
    return max(1, IMAGE_SIDE // longest) if longest <= MAX_IMAGE_SIDE else 0


def _row_tile(
    config: Config, sampler: MixtureSampler, tokenizer: Tokenizer, batch: HostBatch, row: int, factor: int
) -> Tile:
    arrays = {name: array[row] for name, array in batch.arrays.items()}
    high, low = arrays["example_index"]
    example = (int(high) << 32) + int(low)
    draw = sampler.draw(example)
    pixels = row_image(arrays["patches"], arrays["coords"], arrays["valid"], config.model.patch_size)
    rows, columns = (size // config.model.patch_size for size in pixels.shape[:2])
    tokens = arrays["tokens"][arrays["token_valid"]]
    label = f"{rows} × {columns} patches · {counted(len(tokens), 'token')}"
    if tokenizer.unk_id is not None and (unknown := int((tokens == tokenizer.unk_id).sum())):
        label += f", {unknown} unknown"
    if arrays["truncated"]:
        label += ", no more fit"
    texts = {label: [tokenizer.decode(tokens)]}
    if faults := [fault for fault in batch.faults if fault.example == example]:
        texts["in place of"] = [f"{fault.key or f'record {fault.record:,}'}: {fault.reason}" for fault in faults]
    image = magnified(pixels, factor) if factor else fitted(pixels, MAX_IMAGE_SIDE)
    return Tile(f"example {example:,}", f"{draw.source} · {draw.kind}", texts, image)


def _batch_facts(config: Config, sampler: MixtureSampler, batch: HostBatch) -> dict[str, list[str]]:
    arrays = batch.arrays
    first, end = (sampler.schedule.first_example(step) for step in (batch.step, batch.step + 1))
    facts = {"batch": [f"examples {first:,} to {end - 1:,}"]}
    if config.data.areas:
        facts["patches"] = [f"at most {arrays['valid'].shape[1]:,} each, {arrays['valid'].mean():.1%} used"]
    mixture = mixture_counts(config.data.mixture)
    total = sum(sum(kinds.values()) for kinds in mixture.values())
    facts["mixture asked"] = [
        f"{name}: " + ", ".join(f"{kind} {100 * count / total:.3g} %" for kind, count in kinds.items() if count)
        for name, kinds in mixture.items()
    ]
    rows = np.bincount(arrays["source"], minlength=len(config.data.sources))
    facts["rows by source"] = [f"{name}: {count:,}" for name, count in zip(config.data.sources, rows)]
    facts["captions cut to fit"] = [f"{arrays['truncated'].sum():,} of {counted(len(arrays['truncated']), 'row')}"]
    reasons = collections.Counter(fault.reason for fault in batch.faults)
    facts["unusable records met"] = [f"{reason}: {n:,}" for reason, n in sorted(reasons.items())] or ["none"]
    return facts


def _integer_histogram(title: str, values: np.ndarray, note: str) -> BarChart:
    """Histogram of integers, with one bar per value if the range is small."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MAX_BARS)
    starts = range(low, high + 1, width)
    labels = [str(start) if width == 1 else f"{start}–{start + width - 1}" for start in starts]
    return BarChart(title, labels, np.bincount((values - low) // width).tolist(), note)
