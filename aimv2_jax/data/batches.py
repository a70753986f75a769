"""One process' rows of one batch, built from a step number alone: what a worker does. Numpy only.

b rows of this process, L patches, P numbers a patch, T text tokens, R reasons.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from aimv2_jax.data import captions, records, transforms
from aimv2_jax.data.plan import Plan, example_rng
from aimv2_jax.data.readahead import ReadAhead
from aimv2_jax.data.records import REASONS, BadRecord, Record
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import GuardStop

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A record that example number `example` met and could not use."""

    example: int
    source: str
    record: int
    key: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """A batch before its captions are tokens; `captions` are cleaned, in UTF-8, b"" in rows of filling.

    `seconds` is the time that each stage of building took, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    captions: list[bytes]
    faults: list[Fault]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainingView:
    """How a training example sees its picture: a random crop and flip that its number decides."""

    seed: int
    size: int
    area: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: Image.Image, example: int) -> np.ndarray:
        crop_rng = example_rng(self.seed, "crop", example)
        pixels = transforms.random_resized_crop(image, crop_rng, self.size, self.area, self.ratio)
        flipped = example_rng(self.seed, "flip", example).random() < self.flip
        return transforms.flip(pixels) if flipped else pixels


@dataclasses.dataclass(frozen=True)
class CenterView:
    """How an evaluation example sees its picture: the centre square."""

    size: int

    def __call__(self, image: Image.Image, example: int) -> np.ndarray:
        return transforms.center_crop(image, self.size)


class _Search:
    """The search for the record of one example, among candidates: a thread reads, and the builder may send it on.

    `found` is the candidate that was read and has the caption; None when there is none left. `faults` are those before.
    """

    def __init__(self, row: int, example: int, source: Source, kind: str, candidates: Iterable[int]):
        self.row, self.example, self.source, self.kind = row, example, source, kind
        self.found: Record | None = None
        self.faults: list[Fault] = []
        self._candidates = iter(candidates)
        self._index = -1

    def advance(self) -> None:
        """Reads on until a record has the caption; those that cannot be read or lack it are faults."""
        self.found = None
        for index in self._candidates:
            self._index = index
            try:
                record = records.decode(self.source.read(index))
            except BadRecord as error:
                self.reject(error)
                continue
            if self.kind in record.captions:
                self.found = record
                return
            self.reject(BadRecord("missing_caption", record.key))

    @property
    def size(self) -> int:
        return len(self.found.image) if self.found else 0

    def reject(self, error: BadRecord) -> None:
        """The record that was read last is unusable."""
        self.faults.append(Fault(self.example, self.source.name, self._index, error.key, error.reason))


def load(record: Record, kind: str) -> tuple[Image.Image, bytes]:
    """The picture of a record and its cleaned caption of `kind` in UTF-8; raises `BadRecord`."""
    try:
        caption = captions.clean(record.captions[kind])
        return transforms.decode_image(record.image), caption.encode()
    except BadRecord as error:
        raise BadRecord(error.reason, record.key) from error


class _Rows:
    """The rows of one batch while they are filled; those never filled stay filling, with `valid` False."""

    def __init__(self, step: int, examples: Sequence[int], grid: tuple[int, int], patch_size: int):
        count, num_patches = len(examples), grid[0] * grid[1]
        self._step, self._patch_size = step, patch_size
        self._captions, self._faults = [b""] * count, []
        self._seconds: collections.Counter[str] = collections.Counter()
        self.arrays = {
            "patches": np.zeros((count, num_patches, 3 * patch_size**2), np.uint8),
            "coords": np.broadcast_to(transforms.patch_coords(grid), (count, num_patches, 2)).copy(),
            "valid": np.zeros((count, num_patches), bool),
            "example_index": np.array([divmod(example, 1 << 32) for example in examples], np.uint32).reshape(count, 2),
            "source": np.zeros(count, np.int32),
            "faults": np.zeros((count, len(REASONS)), np.int32),
        }

    def fill(self, row: int, pixels: np.ndarray, caption: bytes) -> None:
        self.arrays["patches"][row] = transforms.patchify(pixels, self._patch_size)
        self.arrays["valid"][row] = True
        self._captions[row] = caption

    def fill_from(self, search: _Search, view: Callable[[Image.Image, int], np.ndarray]) -> bool:
        """Fills the row of `search` from what it found, or finds when sent on; False where that was nothing usable."""
        while search.found is not None:
            try:
                image, caption = load(search.found, search.kind)
            except BadRecord as error:
                search.reject(error)
                search.advance()
                continue
            self.fill(search.row, view(image, search.example), caption)
            break
        for fault in search.faults:
            self.arrays["faults"][search.row, REASONS.index(fault.reason)] += 1
        self._faults += search.faults
        return search.found is not None

    def timed(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, and the time until each of them comes counts as that of `stage`."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            item = next(iterator, None)
            self._seconds[stage] += time.perf_counter() - start
            if item is None:
                return
            yield item

    def done(self) -> LocalBatch:
        return LocalBatch(self._step, self.arrays, self._captions, self._faults, dict(self._seconds))


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """step -> this process' rows of that step's batch; `rows` are their places in the global batch."""

    plan: Plan
    sources: Mapping[str, Source]
    rows: tuple[int, ...]
    view: Callable[[Image.Image, int], np.ndarray]
    grid: tuple[int, int]
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __call__(self, step: int) -> LocalBatch:
        examples = [self.plan.first_example(step) + row for row in self.rows]
        rows, order = _Rows(step, examples, self.grid, self.patch_size), list(self.sources)
        for search in rows.timed("read", self.reads(step, self._searches)):
            rows.arrays["source"][search.row] = order.index(search.source.name)
            if not rows.fill_from(search, self.view):
                tried = collections.Counter(fault.reason for fault in search.faults)
                reasons = ", ".join(f"{count} x {reason}" for reason, count in tried.items())
                raise GuardStop(
                    f"data source {search.source.name!r} gave no usable record for its {search.kind} captions: "
                    f"{reasons}; prepare the data set again, or take its weight out of data.mixture"
                )
        return rows.done()

    def _searches(self, step: int) -> Iterator[_Search]:
        for row, place in enumerate(self.rows):
            example = self.plan.first_example(step) + place
            draw = self.plan.draw(example)
            yield _Search(row, example, self.sources[draw.source], draw.kind, self.plan.records(draw))


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """number -> this process' rows of that batch of a held-out set: records in order, each once; none is replaced.

    `examples` lists (source, records of it) in order; `rows` are places in the global batch of `batch_size`. Unusable
    records, and rows beyond the last example, are rows of filling.
    """

    sources: Mapping[str, Source]
    examples: tuple[tuple[str, int], ...]
    kind: str
    batch_size: int
    rows: tuple[int, ...]
    view: Callable[[Image.Image, int], np.ndarray]
    grid: tuple[int, int]
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __len__(self) -> int:
        return -(-sum(count for _, count in self.examples) // self.batch_size)

    def __call__(self, number: int) -> LocalBatch:
        examples = [number * self.batch_size + row for row in self.rows]
        rows, order = _Rows(number, examples, self.grid, self.patch_size), list(self.sources)
        for search in rows.timed("read", self.reads(number, self._searches)):
            rows.arrays["source"][search.row] = order.index(search.source.name)
            rows.fill_from(search, self.view)
        return rows.done()

    def _searches(self, number: int) -> Iterator[_Search]:
        ends = np.cumsum([count for _, count in self.examples])
        for row, place in enumerate(self.rows):
            example = number * self.batch_size + place
            if example < ends[-1]:
                which = int(np.searchsorted(ends, example, side="right"))
                name, count = self.examples[which]
                index = example - (int(ends[which]) - count)
                yield _Search(row, example, self.sources[name], self.kind, [index])
