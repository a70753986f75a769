"""One process' rows of one batch, built from a step number alone: what a worker does. Numpy only.

b rows of this process, L patches, P numbers a patch, T text tokens, R reasons.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from aimv2_jax.data import captions, records, transforms
from aimv2_jax.data.chance import example_rng
from aimv2_jax.data.clock import StageClock
from aimv2_jax.data.pictures import Picture, open_picture
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.readahead import ReadAhead
from aimv2_jax.data.records import REASONS, BadRecord, Record
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import GuardStop


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

    def __call__(self, picture: Picture, example: int, most_patches: int, clock: StageClock) -> np.ndarray:
        crop_rng = example_rng(self.seed, "crop", example)
        box = transforms.crop_box(crop_rng, *picture.size, self.area, self.ratio)
        return _look(picture, box, self.size, is_flipped(self.seed, example, self.flip), clock)


@dataclasses.dataclass(frozen=True)
class CenterView:
    """How an evaluation example sees its picture: the centre square, see `transforms.center_view`."""

    size: int

    def __call__(self, picture: Picture, example: int, most_patches: int, clock: StageClock) -> np.ndarray:
        image = picture.whole()
        clock.lap("decode")
        pixels = transforms.center_view(image, self.size)
        clock.lap("resize")
        return pixels


@dataclasses.dataclass(frozen=True)
class NativeView:
    """How an example sees its picture at native resolution: whole, with its aspect, in as many patches as there may be.

    `flip` is the probability of a flip that the example's number decides.
    """

    seed: int
    patch_size: int
    upscale: bool
    flip: float = 0.0

    def __call__(self, picture: Picture, example: int, most_patches: int, clock: StageClock) -> np.ndarray:
        width, height = picture.size
        if not self.upscale:
            most_patches = min(most_patches, max(1, width * height // self.patch_size**2))
        rows, columns = transforms.fit_grid(width, height, most_patches)
        size = (columns * self.patch_size, rows * self.patch_size)
        return _look(picture, (0, 0, width, height), size, is_flipped(self.seed, example, self.flip), clock)


def is_flipped(seed: int, example: int, probability: float) -> bool:
    """Whether an example sees its picture with left and right exchanged."""
    return example_rng(seed, "flip", example).random() < probability


def _look(
    picture: Picture, box: transforms.Box, size: int | tuple[int, int], flipped: bool, clock: StageClock
) -> np.ndarray:
    image, box = picture.decode(box, size)
    clock.lap("decode")
    pixels = transforms.resize(image, box, size, flipped)
    clock.lap("resize")
    return pixels


View = Callable[[Picture, int, int, StageClock], np.ndarray]
"""(a picture, the example's number, the patches it may have, its batch's clock) -> pixels; raises `BadRecord`."""


class _Search:
    """The search for the record of one example, among candidates: a thread reads, and the builder may send it on.

    `found` is the candidate that was read and has the caption; None when there is none left. `faults` are those before.
    """

    def __init__(self, row: int, example: int, source: Source, kind: str, candidates: Iterable[int]):
        self.row, self.example, self.source, self.kind = row, example, source, kind
        self.found: Record | None = None
        self.faults: list[Fault] = []
        self._candidates = iter(candidates)
        self.index = -1

    def advance(self) -> None:
        """Reads on until a record has the caption; those that cannot be read or lack it are faults."""
        self.found = None
        for index in self._candidates:
            self.index = index
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
        return len(self.found.image) if self.found else self.source.mean_bytes

    def reject(self, error: BadRecord) -> None:
        """The record that was read last is unusable."""
        self.faults.append(Fault(self.example, self.source.name, self.index, error.key, error.reason))


def render(
    record: Record, kind: str, view: View, example: int, most_patches: int, clock: StageClock
) -> tuple[np.ndarray, bytes]:
    """What `view` makes of the picture for `example`, and the cleaned caption in UTF-8; raises `BadRecord`."""
    try:
        if kind not in record.captions:
            raise BadRecord("missing_caption")
        caption = captions.clean(record.captions[kind]).encode()
        clock.lap("caption")
        return view(open_picture(record.image), example, most_patches, clock), caption
    except BadRecord as error:
        raise BadRecord(error.reason, record.key) from error


class _Rows:
    """The rows of one batch while they are filled; those never filled stay filling, with `valid` False."""

    def __init__(self, step: int, examples: Sequence[int], num_patches: int, patch_size: int):
        count = len(examples)
        self._step, self._num_patches, self._patch_size = step, num_patches, patch_size
        self._captions, self._faults = [b""] * count, []
        self.clock = StageClock()
        self.arrays = {
            "patches": np.zeros((count, num_patches, 3 * patch_size**2), np.uint8),
            "coords": np.zeros((count, num_patches, 2), np.int32),
            "valid": np.zeros((count, num_patches), bool),
            "example_index": np.array([divmod(example, 1 << 32) for example in examples], np.uint32).reshape(count, 2),
            "source": np.zeros(count, np.int32),
            "faults": np.zeros((count, len(REASONS)), np.int32),
        }

    def fill(self, row: int, pixels: np.ndarray, caption: bytes) -> None:
        rows, columns = pixels.shape[0] // self._patch_size, pixels.shape[1] // self._patch_size
        used = slice(rows * columns)  # The others are padding.
        transforms.patchify(pixels, self._patch_size, out=self.arrays["patches"][row, used])
        self.arrays["coords"][row, used] = transforms.patch_coords((rows, columns))
        self.arrays["valid"][row, used] = True
        self._captions[row] = caption
        self.clock.lap("patchify")

    def fill_from(self, search: _Search, view: View) -> bool:
        """Fills the row of `search` from what it found, or finds when sent on; False where that was nothing usable."""
        while search.found is not None:
            try:
                pixels, caption = render(search.found, search.kind, view, search.example, self._num_patches, self.clock)
            except BadRecord as error:
                self.clock.lap("decode")
                search.reject(error)
                search.advance()
                self.clock.lap("read")
                continue
            self.fill(search.row, pixels, caption)
            break
        for fault in search.faults:
            self.arrays["faults"][search.row, REASONS.index(fault.reason)] += 1
        self._faults += search.faults
        return search.found is not None

    def done(self) -> LocalBatch:
        return LocalBatch(self._step, self.arrays, self._captions, self._faults, dict(self.clock.seconds))


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """step -> this process' rows of that step's batch; `rows`: the places they have in a global batch of a size."""

    plan: Plan
    sources: Mapping[str, Source]
    rows: Mapping[int, tuple[int, ...]]
    view: View
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __call__(self, step: int) -> LocalBatch:
        num_patches, order = self.plan.steps.shape(step).patches, list(self.sources)
        rows = _Rows(step, self._examples(step), num_patches, self.patch_size)
        for search in self.reads(step, self._searches):
            rows.clock.lap("read")
            rows.arrays["source"][search.row] = order.index(search.source.name)
            if not rows.fill_from(search, self.view):
                tried = collections.Counter(fault.reason for fault in search.faults)
                reasons = ", ".join(f"{count} x {reason}" for reason, count in tried.items())
                raise GuardStop(
                    f"data source {search.source.name!r} gave no usable record for its {search.kind} captions: "
                    f"{reasons}; prepare the data set again, or take its weight out of data.mixture"
                )
        return rows.done()

    def _examples(self, step: int) -> list[int]:
        first = self.plan.steps.first_example(step)
        return [first + place for place in self.rows[self.plan.steps.shape(step).examples]]

    def _searches(self, step: int) -> Iterator[_Search]:
        for row, example in enumerate(self._examples(step)):
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
    view: View
    num_patches: int
    patch_size: int
    reads: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __len__(self) -> int:
        return -(-sum(count for _, count in self.examples) // self.batch_size)

    def __call__(self, number: int) -> LocalBatch:
        examples = [number * self.batch_size + row for row in self.rows]
        rows, order = _Rows(number, examples, self.num_patches, self.patch_size), list(self.sources)
        for search in self.reads(number, self._searches):
            rows.clock.lap("read")
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
