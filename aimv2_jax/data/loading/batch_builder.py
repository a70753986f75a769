"""Builds this process's rows of a batch from the step number alone. Runs in workers, which do not import jax."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from aimv2_jax.data import records
from aimv2_jax.data.loading.read_ahead import ReadAhead
from aimv2_jax.data.loading.worker_status import Activity, WorkerStatus
from aimv2_jax.data.records import REASONS, BadRecord, Record
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms import captions, geometry
from aimv2_jax.data.transforms.decode import open_encoded
from aimv2_jax.data.transforms.views import Size, View
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.storage.retries import DATA_RETRIES
from aimv2_jax.untrusted import shorten


@dataclasses.dataclass(frozen=True)
class BadExample:
    """An unusable record that was drawn for example number `example`."""

    example: int
    source: str
    record: int
    key: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class LocalBatch:
    """A batch before tokenization.

    Attributes:
      step: number of the batch.
      arrays: all arrays of the batch except those of its tokens, by name.
      captions: cleaned captions in UTF-8; b"" in padding rows.
      faults: records that were rejected.
      seconds: time spent in each stage of building, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    captions: list[bytes]
    faults: list[BadExample]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class StageTimer:
    """Splits the time since its creation into stages; `seconds` has the time of each stage by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@dataclasses.dataclass
class _RecordFetch:
    """Fetches a usable record for one example.

    A thread reads candidates until one has the caption. If the builder cannot use that one, it advances to the next.

    Attributes:
      row: the example's row in this process's part of the batch.
      kind: the kind of caption.
      candidates: indices of the records to try.
      view: image size -> view of the image.
      choose_caption: (record index, number of captions) -> index of the caption; by default the first.
      index: index of the last record read.
      label: its name, for messages.
      record: the last record read, which has the caption; None when no candidate is left.
      faults: the rejected candidates.
    """

    row: int
    example: int
    source: Source
    kind: str
    candidates: Iterator[int]
    view: Callable[[Size], View]
    status: WorkerStatus
    choose_caption: Callable[[int, int], int] = lambda index, count: 0
    index: int = -1
    label: str = ""
    record: Record | None = None
    caption: str = ""
    faults: list[BadExample] = dataclasses.field(default_factory=list)

    def advance(self) -> None:
        """Reads candidates until one has the caption; rejects those that are unreadable or lack it."""
        self.record = None
        for index in self.candidates:
            self.index, self.label = index, self.source.describe(index)
            try:
                record = records.decode(self._read())
            except BadRecord as error:
                self.reject(error.reason, error.key)
                continue
            if texts := record.texts(self.kind):
                self.record = record
                self.caption = texts[self.choose_caption(index, len(texts))]
                return
            self.reject("missing_caption", record.key)

    def _read(self) -> bytes:
        self.status.update(Activity.READS, self.label)
        try:
            return self.source.read(self.index)
        finally:
            self.status.update(Activity.HAS_READ, self.label)

    @property
    def size(self) -> int:
        return len(self.record.image) if self.record else self.source.mean_bytes

    def reject(self, reason: str, key: str | None) -> None:
        """Adds the last record read to `faults`, with the reason."""
        key = key and shorten(key)  # Keys are untrusted and may have any length.
        self.faults.append(BadExample(self.example, self.source.name, self.index, key, reason))


class _BatchArrays:
    """The arrays of one batch while its rows are filled. Rows that are not filled are padding, with `valid` False."""

    def __init__(
        self,
        step: int,
        examples: Sequence[int],
        num_patches: int,
        patch_size: int,
        source_names: Iterable[str],
        teacher_size: int | None,
    ):
        rows = len(examples)
        self._step = step
        self._patch_size = patch_size
        self._teacher_size = teacher_size
        self._source_names = list(source_names)
        self._captions = [b""] * rows
        self._faults: list[BadExample] = []
        self._timer = StageTimer()
        self._arrays = {
            "patches": np.zeros((rows, num_patches, 3 * patch_size**2), np.uint8),
            "coords": np.zeros((rows, num_patches, 2), np.int32),
            "valid": np.zeros((rows, num_patches), bool),
            "example_index": np.array([divmod(number, 1 << 32) for number in examples], np.uint32).reshape(rows, 2),
            "source": np.zeros(rows, np.int32),
            "faults": np.zeros((rows, len(REASONS)), np.int32),
            "read_retries": np.zeros(rows, np.int32),
        }
        if teacher_size is not None:
            length = (teacher_size // patch_size) ** 2
            self._arrays["teacher_patches"] = np.zeros((rows, length, 3 * patch_size**2), np.uint8)

    def fill(self, fetches: Iterable[_RecordFetch], status: WorkerStatus) -> Iterator[_RecordFetch]:
        """Fills the rows of `fetches`; yields the fetches that found no usable record, whose rows stay padding."""
        for fetch in fetches:
            self._timer.lap("read")
            self._arrays["source"][fetch.row] = self._source_names.index(fetch.source.name)
            status.update(Activity.BUILDS, fetch.label, self._step)
            usable = self._fill_from(fetch)
            # The time until the next record is read does not count as building this one.
            status.update(Activity.HAS_READ, fetch.label)
            if not usable:
                yield fetch
        status.update(Activity.HAS_BUILT, "", self._step)

    def _fill_from(self, fetch: _RecordFetch) -> bool:
        """Fills the row of `fetch`, trying further candidates on failure; returns False if none works."""
        while fetch.record is not None:
            try:
                self._fill_row(fetch.row, fetch.record, fetch.caption, fetch.view)
                break
            except BadRecord as error:
                self._timer.lap("decode")
                fetch.reject(error.reason, fetch.record.key)
                fetch.advance()
                self._timer.lap("read")
        for fault in fetch.faults:
            self._arrays["faults"][fetch.row, REASONS.index(fault.reason)] += 1
        self._faults += fetch.faults
        return fetch.record is not None

    def _fill_row(self, row: int, record: Record, caption: str, view_of: Callable[[Size], View]) -> None:
        """Fills a row with an image and its cleaned caption; raises `BadRecord` if either is unusable."""
        text = captions.clean(caption).encode()
        self._timer.lap("caption")
        image = open_encoded(record.image)
        view = view_of(image.size)
        teacher_view = view if self._teacher_size is None else view.resized(self._teacher_size)
        # Decoding may reduce the image as far as the larger view allows, and serves both.
        decoded = max(view, teacher_view, key=View.pixels).decode(image)
        self._timer.lap("decode")
        pixels = view.resize(decoded)
        teacher_pixels = None if self._teacher_size is None else teacher_view.resize(decoded)
        self._timer.lap("resize")
        arrays = (self._arrays[name][row] for name in ("patches", "coords", "valid"))
        geometry.write_patches(pixels, self._patch_size, *arrays)
        if teacher_pixels is not None:
            geometry.patchify(teacher_pixels, self._patch_size, out=self._arrays["teacher_patches"][row])
        self._captions[row] = text
        self._timer.lap("patchify")

    def to_batch(self) -> LocalBatch:
        if len(self._captions):  # Those since the batch before, in any row: all rows are summed.
            self._arrays["read_retries"][0] = DATA_RETRIES.take()
        return LocalBatch(self._step, self._arrays, self._captions, self._faults, self._timer.seconds)


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """Builds this process's rows of a training batch; called with the step.

    Args:
      sampler: draws the source, record and caption of each example.
      sources: the sources by name, in the config's order.
      rows: by size of the global batch, the indices of this process's rows in it.
      views: by number of patches per example, a function (image size, example number) -> view of the image.
      patch_size: side of a patch.
      teacher_size: side of the square in which a teacher sees the same view, as `teacher_patches`; None: not.
      read_ahead: runs the fetches.
    """

    sampler: MixtureSampler
    sources: Mapping[str, Source]
    rows: Mapping[int, tuple[int, ...]]
    views: Mapping[int, Callable[[Size, int], View]]
    patch_size: int
    teacher_size: int | None = None
    read_ahead: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __call__(self, step: int, status: WorkerStatus | None = None) -> LocalBatch:
        status = status or WorkerStatus()
        num_patches = self.sampler.schedule.shape(step).patches
        examples = self._examples(step)
        batch = _BatchArrays(step, examples, num_patches, self.patch_size, self.sources, self.teacher_size)
        for fetch in batch.fill(self.read_ahead(step, functools.partial(self._fetches, status)), status):
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

    def _fetches(self, status: WorkerStatus, step: int) -> Iterator[_RecordFetch]:
        view = self.views[self.sampler.schedule.shape(step).patches]
        for row, example in enumerate(self._examples(step)):
            draw = self.sampler.draw(example)
            yield _RecordFetch(
                row,
                example,
                self.sources[draw.source],
                draw.kind,
                iter(self.sampler.records(draw)),
                functools.partial(view, example=example),
                status,
                functools.partial(self.sampler.caption, draw),
            )


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Builds this process's rows of a held-out batch; called with the batch number.

    The batches show the records in order, each once. A record with several captions of the kind shows its first.
    Unusable records are not replaced: their rows, and rows beyond the last example, are padding.

    Args:
      sources: the sources by name, in the config's order.
      examples: (source, number of its records), in order.
      kind: the kind of captions.
      batch_size: the size of a global batch.
      rows: the indices of this process's rows in a global batch.
      view: image size -> view of the image.
      num_patches: patches of a row.
      patch_size: side of a patch.
      teacher_size: side of the square in which a teacher sees the same view, as `teacher_patches`; None: not.
      read_ahead: runs the fetches.
    """

    sources: Mapping[str, Source]
    examples: tuple[tuple[str, int], ...]
    kind: str
    batch_size: int
    rows: tuple[int, ...]
    view: Callable[[Size], View]
    num_patches: int
    patch_size: int
    teacher_size: int | None = None
    read_ahead: ReadAhead = dataclasses.field(default_factory=ReadAhead)

    def __len__(self) -> int:
        return -(-sum(count for _, count in self.examples) // self.batch_size)

    def __call__(self, number: int, status: WorkerStatus | None = None) -> LocalBatch:
        status = status or WorkerStatus()
        examples = [number * self.batch_size + row for row in self.rows]
        batch = _BatchArrays(number, examples, self.num_patches, self.patch_size, self.sources, self.teacher_size)
        for _ in batch.fill(self.read_ahead(number, functools.partial(self._fetches, status)), status):
            pass  # The row stays padding.
        return batch.to_batch()

    def _fetches(self, status: WorkerStatus, number: int) -> Iterator[_RecordFetch]:
        ends = np.cumsum([count for _, count in self.examples])
        for row, batch_row in enumerate(self.rows):
            example = number * self.batch_size + batch_row
            if example < ends[-1]:
                source_index = int(np.searchsorted(ends, example, side="right"))
                name, count = self.examples[source_index]
                record_index = example - (int(ends[source_index]) - count)
                yield _RecordFetch(row, example, self.sources[name], self.kind, iter([record_index]), self.view, status)
