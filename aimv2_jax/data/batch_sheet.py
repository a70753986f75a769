"""What a contact sheet shows of a training batch: its rows as the model gets them. L patches, P numbers a patch."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from matplotlib.figure import Figure

from aimv2_jax.config import Config, mixture_counts
from aimv2_jax.data import pipeline, transforms
from aimv2_jax.data.charts import BarChart, NameChart
from aimv2_jax.data.contact_sheet import LARGEST_PICTURE, PICTURE_SIDE, Tile, contact_sheet, fitted, magnified
from aimv2_jax.data.pipeline import HostBatch
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.drawing import Pixels, counted

MOST_ROWS = 256  # Of a batch that are read: 8192 would take half a minute, and their histograms look the same.
_MOST_BARS = 20
_MOST_SOURCES = 12


def batch_sheet(config: Config, name: str, step: int, most_pictures: int) -> Figure:
    """The first rows of the batch of `step` as they go to the model, with what their tokens decode to.

    Beside them the mixture that is asked for, and counts of sources, tokens and patches over up to `MOST_ROWS` rows.

    Raises:
      UserError: if a source or the tokenizer of `config` cannot be used.
    """
    pipeline.check_sources(config)
    decoder = config.model.decoder
    tokenizer = Tokenizer(config.tokenizer.path, decoder.text_length, decoder.vocab_size, config.loss.predict_eos)
    # Threads of this process: a batch is the same however it is built, and workers would take seconds to start.
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0, prefetch=1))
    plan = pipeline.training_plan(config, pipeline.open_sources(config.data.sources))
    size = plan.steps.shape(step).examples
    rows = min(MOST_ROWS, size)
    with pipeline.training_batches(single, lambda _: range(rows), step, tokenizer) as batches:
        batch = next(batches)
    count = min(most_pictures, rows)
    factor = _factor(batch, count, config.model.patch_size)
    tiles = [_row_tile(config, plan, tokenizer, batch, row, factor) for row in range(count)]
    note = f"Rows 0 to {count - 1:,} of {size:,}, as the model gets them"
    note += {0: ", reduced to fit", 1: ""}.get(factor, f", every pixel drawn as {factor} × {factor}")
    note += "; below them, what their tokens decode to."
    if rows < size:
        note += f" Counts are of the first {rows:,} rows."
    return contact_sheet(
        tiles, _batch_facts(config, plan, batch), _batch_charts(config, batch), f"{name}, step {step:,}", note
    )


def row_picture(
    patches: UInt8[np.ndarray, "L P"], coords: Int32[np.ndarray, "L 2"], valid: Bool[np.ndarray, " L"], patch_size: int
) -> Pixels:
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
    picture = magnified(pixels, factor) if factor else fitted(pixels, LARGEST_PICTURE)
    return Tile(f"example {example:,}", subtitle, texts, picture)


def _batch_facts(config: Config, plan: Plan, batch: HostBatch) -> dict[str, str]:
    first, end = (plan.steps.first_example(step) for step in (batch.step, batch.step + 1))
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
    sources.update(names[place] for place in batch.arrays["source"][used])
    ordered = sources.most_common()
    shown = dict(ordered[:_MOST_SOURCES])
    if rest := ordered[_MOST_SOURCES:]:
        shown[f"{len(rest)} others"] = sum(count for _, count in rest)
    return [
        NameChart("Rows by source", shown),
        _whole_numbers("Tokens a row", tokens, f"text tokens, of {config.model.decoder.text_length} with the end"),
        _whole_numbers("Patches a row", patches, "valid patches"),
    ]


def _whole_numbers(title: str, values: np.ndarray, note: str) -> BarChart:
    """A histogram of whole numbers; a bar each where that makes few bars."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // _MOST_BARS)
    counts = np.bincount((values - low) // width)
    places = range(len(counts))
    texts = [str(low + width * i) if width == 1 else f"{low + width * i}–{low + width * (i + 1) - 1}" for i in places]
    every = -(-sum(map(len, texts)) // 36)
    return BarChart(title, counts.tolist(), {i: texts[i] for i in places if i % every == 0}, note)
