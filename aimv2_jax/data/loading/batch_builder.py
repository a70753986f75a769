"""Builds this process's rows of one batch from a step number alone, in a worker. Numpy only.

b rows of this process, L patches, P values per patch, T text tokens, R reasons.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from aimv2_jax.data import records
from aimv2_jax.data.loading.read_ahead import ReadAhead
from aimv2_jax.data.loading.stage_timer import StageTimer
from aimv2_jax.data.records import REASONS, BadRecord, Record
from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms import captions, geometry
from aimv2_jax.data.transforms.decode import EncodedImage, open_encoded
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.untrusted import shorten


@dataclasses.dataclass(frozen=True)
class BadExample:
    """An unusable record that example number `example` drew."""

    example: int
    source: str
    record: int
    key: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """A batch before tokenization; `captions` are cleaned, in UTF-8, b"" in padding rows.

    `seconds` is the time spent in each stage of building, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    captions: list[bytes]
    faults: list[BadExample]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainingTransform:
    """Random crop and flip of a training image, a function of the example number."""

    seed: int
    size: int
    area: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: EncodedImage, example: int, max_patches: int, timer: StageTimer) -> np.ndarray:
        crop_rng = example_rng(self.seed, "crop", example)
        box = geometry.crop_box(crop_rng, *image.size, self.area, self.ratio)
        return _decode_and_resize(image, box, self.size, is_flipped(self.seed, example, self.flip), timer)


@dataclasses.dataclass(frozen=True)
class CenterTransform:
    """Centre square of an evaluation image, see `geometry.center_view`."""

    size: int

    def __call__(self, image: EncodedImage, example: int, max_patches: int, timer: StageTimer) -> np.ndarray:
        decoded = image.decode_full()
        timer.lap("decode")
        pixels = geometry.center_view(decoded, self.size)
        timer.lap("resize")
        return pixels


@dataclasses.dataclass(frozen=True)
class NativeTransform:
    """Native resolution: the whole image with its aspect, in at most `max_patches` patches.

    `flip` is the probability of a flip, which the example number decides.
    """

    seed: int
    patch_size: int
    upscale: bool
    flip: float = 0.0

    def __call__(self, image: EncodedImage, example: int, max_patches: int, timer: StageTimer) -> np.ndarray:
        width, height = image.size
        if not self.upscale:
            max_patches = min(max_patches, max(1, width * height // self.patch_size**2))
        rows, columns = geometry.fit_grid(width, height, max_patches)
        size = (columns * self.patch_size, rows * self.patch_size)
        flipped = is_flipped(self.seed, example, self.flip)
        return _decode_and_resize(image, (0, 0, width, height), size, flipped, timer)


def is_flipped(seed: int, example: int, probability: float) -> bool:
    """Whether the image of an example is flipped left to right."""
    return example_rng(seed, "flip", example).random() < probability


def _decode_and_resize(
    image: EncodedImage, box: geometry.Box, size: int | tuple[int, int], flipped: bool, timer: StageTimer
) -> np.ndarray:
    decoded, box = image.decode(box, size)
    timer.lap("decode")
    pixels = geometry.resize(decoded, box, size, flipped)
    timer.lap("resize")
    return pixels


ImageTransform = Callable[[EncodedImage, int, int, StageTimer], np.ndarray]
"""(image, example number, maximum number of patches, the batch's timer) -> pixels; raises `BadRecord`."""


class _RecordFetch:
    """Fetches a usable record for one example: a thread reads candidates, and the builder may ask for the next one.

    `record` is the last candidate read that has the caption, None when no candidate is left. `faults` are the rejected
    ones. `choose_caption(index, count)` picks one of the `count` captions of record `index`; default: the first.
    """

    def __init__(
        self,
        row: int,
        example: int,
        source: Source,
        kind: str,
        candidates: Iterable[int],
        choose_caption: Callable[[int, int], int] = lambda index, count: 0,
    ):
        self.row = row
        self.example = example
        self.source = source
        self.kind = kind
        self.record: Record | None = None
        self.caption = ""
        self.faults: list[BadExample] = []
        self.index = -1
        self._candidates = iter(candidates)
        self._choose_caption = choose_caption

    def advance(self) -> None:
        """Reads candidates until one has the caption; unreadable ones and those without it are rejected."""
        self.record = None
        for index in self._candidates:
            self.index = index
            try:
                record = records.decode(self.source.read(index))
            except BadRecord as error:
                self.reject(error)
                continue
            if texts := record.texts(self.kind):
                self.record = record
                self.caption = texts[self._choose_caption(index, len(texts))]
                return
            self.reject(BadRecord("missing_caption", record.key))

    @property
    def size(self) -> int:
        return len(self.record.image) if self.record else self.source.mean_bytes

    def reject(self, error: BadRecord) -> None:
        """Adds the last record read to `faults`."""
        key = error.key and shorten(error.key)  # Keys are untrusted and may have any length.
        self.faults.append(BadExample(self.example, self.source.name, self.index, key, error.reason))


def render(
    record: Record, caption: str, transform: ImageTransform, example: int, max_patches: int, timer: StageTimer
) -> tuple[np.ndarray, bytes]:
    """The transformed image of `example` and its cleaned caption in UTF-8; raises `BadRecord`."""
    try:
        text = captions.clean(caption).encode()
        timer.lap("caption")
        return transform(open_encoded(record.image), example, max_patches, timer), text
    except BadRecord as error:
        raise BadRecord(error.reason, record.key) from error


def _array_specs(rows: int, num_patches: int, patch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of the arrays of a batch."""
    return {
        "patches": ((rows, num_patches, 3 * patch_size**2), np.uint8),
        "coords": ((rows, num_patches, 2), np.int32),
        "valid": ((rows, num_patches), bool),
        "example_index": ((rows, 2), np.uint32),
        "source": ((rows,), np.int32),
        "faults": ((rows, len(REASONS)), np.int32),
    }


def batch_bytes(rows: int, num_patches: int, patch_size: int) -> int:
    """Bytes of the arrays of a `LocalBatch`."""
    specs = _array_specs(rows, num_patches, patch_size).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs)


class _BatchArrays:
    """The arrays of one batch while its rows are filled; rows never filled stay padding, with `valid` False."""

    def __init__(self, step: int, examples: Sequence[int], num_patches: int, patch_size: int):
        count = len(examples)
        self._step = step
        self._num_patches = num_patches
        self._patch_size = patch_size
        self._captions = [b""] * count
        self._faults: list[BadExample] = []
        self.timer = StageTimer()
        specs = _array_specs(count, num_patches, patch_size)
        self.arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
        self.arrays["example_index"][:] = np.array([divmod(number, 1 << 32) for number in examples]).reshape(count, 2)

    def fill(self, row: int, pixels: np.ndarray, caption: bytes) -> None:
        rows, columns = pixels.shape[0] // self._patch_size, pixels.shape[1] // self._patch_size
        used = slice(rows * columns)  # The remaining patches are padding.
        geometry.patchify(pixels, self._patch_size, out=self.arrays["patches"][row, used])
        self.arrays["coords"][row, used] = geometry.patch_coords((rows, columns))
        self.arrays["valid"][row, used] = True
        self._captions[row] = caption
        self.timer.lap("patchify")

    def fill_from(self, fetch: _RecordFetch, transform: ImageTransform) -> bool:
        """Fills the row of `fetch`, trying further candidates on failure; False if none works."""
        while fetch.record is not None:
            try:
                pixels, caption = render(
                    fetch.record, fetch.caption, transform, fetch.example, self._num_patches, self.timer
                )
            except BadRecord as error:
                self.timer.lap("decode")
                fetch.reject(error)
                fetch.advance()
                self.timer.lap("read")
                continue
            self.fill(fetch.row, pixels, caption)
            break
        for fault in fetch.faults:
            self.arrays["faults"][fetch.row, REASONS.index(fault.reason)] += 1
        self._faults += fetch.faults
        return fetch.record is not None

    def to_batch(self) -> LocalBatch:
        return LocalBatch(self._step, self.arrays, self._captions, self._faults, dict(self.timer.seconds))


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """step -> this process's rows of that step's batch; `rows`: their indices in a global batch, by its size."""

    sampler: MixtureSampler
    sources: Mapping[str, Source]
    rows: Mapping[int, tuple[int, ...]]
    transform: ImageTransform
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __call__(self, step: int) -> LocalBatch:
        num_patches = self.sampler.schedule.shape(step).patches
        order = list(self.sources)
        batch = _BatchArrays(step, self._examples(step), num_patches, self.patch_size)
        for fetch in self.reads(step, self._fetches):
            batch.timer.lap("read")
            batch.arrays["source"][fetch.row] = order.index(fetch.source.name)
            if not batch.fill_from(fetch, self.transform):
                rejected = collections.Counter(fault.reason for fault in fetch.faults)
                reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.items())
                raise TrainingAborted(
                    f"data source {fetch.source.name!r} gave no usable record for its {fetch.kind} captions: "
                    f"{reasons}; prepare the dataset again, or remove its weight from data.mixture"
                )
        return batch.to_batch()

    def _examples(self, step: int) -> list[int]:
        first = self.sampler.schedule.first_example(step)
        return [first + row for row in self.rows[self.sampler.schedule.shape(step).examples]]

    def _fetches(self, step: int) -> Iterator[_RecordFetch]:
        for row, example in enumerate(self._examples(step)):
            draw = self.sampler.draw(example)
            candidates = self.sampler.records(draw)
            choose_caption = functools.partial(self.sampler.caption, draw)
            yield _RecordFetch(row, example, self.sources[draw.source], draw.kind, candidates, choose_caption)


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """number -> this process's rows of that held-out batch: records in order, each once, without replacements.

    `examples` lists (source, number of its records) in order; `rows` are indices in the global batch of `batch_size`.
    A record with several captions of the kind shows its first. Unusable records, and rows beyond the last example, are
    padding rows.
    """

    sources: Mapping[str, Source]
    examples: tuple[tuple[str, int], ...]
    kind: str
    batch_size: int
    rows: tuple[int, ...]
    transform: ImageTransform
    num_patches: int
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __len__(self) -> int:
        return -(-sum(count for _, count in self.examples) // self.batch_size)

    def __call__(self, number: int) -> LocalBatch:
        examples = [number * self.batch_size + row for row in self.rows]
        batch = _BatchArrays(number, examples, self.num_patches, self.patch_size)
        order = list(self.sources)
        for fetch in self.reads(number, self._fetches):
            batch.timer.lap("read")
            batch.arrays["source"][fetch.row] = order.index(fetch.source.name)
            batch.fill_from(fetch, self.transform)
        return batch.to_batch()

    def _fetches(self, number: int) -> Iterator[_RecordFetch]:
        ends = np.cumsum([count for _, count in self.examples])
        for row, batch_row in enumerate(self.rows):
            example = number * self.batch_size + batch_row
            if example < ends[-1]:
                source_index = int(np.searchsorted(ends, example, side="right"))
                name, count = self.examples[source_index]
                record_index = example - (int(ends[source_index]) - count)
                yield _RecordFetch(row, example, self.sources[name], self.kind, [record_index])
