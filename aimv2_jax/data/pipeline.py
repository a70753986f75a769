"""Batches for the training loop and for evaluation: read ahead in workers, tokenised in a thread, handed to devices.

The batch of a step is a function of (config, step): there is no position to save, and any step can be the first.

b rows of this process, B rows of the global batch, L patches, P numbers a patch, T text tokens, R reasons.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from aimv2_jax.config import Config, mixture_counts
from aimv2_jax.data.batches import (
    CenterView,
    EvaluationBatches,
    Fault,
    LocalBatch,
    NativeView,
    TrainingBatches,
    TrainingView,
    View,
)
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.readahead import QUICK_S, ReadAhead
from aimv2_jax.data.records import REASONS
from aimv2_jax.data.skips import Skips
from aimv2_jax.data.sources import Source
from aimv2_jax.data.steps import Steps
from aimv2_jax.data.workers import cores, start_reader
from aimv2_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    from aimv2_jax.data.tokenizer import Tokenizer

__all__ = [
    "REASONS",
    "Batches",
    "Fault",
    "HostBatch",
    "builders",
    "check_sources",
    "cores",
    "evaluation_batches",
    "open_sources",
    "to_devices",
    "training_batches",
    "training_plan",
]

_ENDLESS = 1 << 48  # Steps: more than any run has.
_FINISHED_BATCHES = 2  # Kept ready by the thread, beside what the workers keep.
_MAX_THREADS = 4  # That build batches in the trainer itself, where there are no workers.


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This process' rows of a batch.

    `arrays`: `patches [b L P] uint8`, `coords [b L 2] int32`, `valid [b L] bool`, `tokens [b T] int32`,
    `token_valid [b T] bool`, `example_index [b 2] uint32` (high and low word of the example's number),
    `source [b] int32` (place in the config's list of sources), `faults [b R] int32` (records that the example met and
    could not use, by `REASONS`). `seconds` is the time that each stage of building took, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    faults: list[Fault]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def open_sources(sources: Mapping[str, str]) -> dict[str, Source]:
    """The sources of a config by name, in its order; raises `UserError` for one that cannot be read."""
    return {name: Source(name, path) for name, path in sources.items()}


def check_sources(config: Config) -> None:
    """Raises `UserError` unless all sources can be read and have the caption kinds that the config asks of them."""
    sources = open_sources(config.data.sources)
    for name, kinds in mixture_counts(config.data.mixture).items():
        for kind in kinds:
            if not sources[name].kinds.get(kind):
                raise UserError(
                    f"config data.mixture.{name} asks for captions of a kind that the data set lacks",
                    kind,
                    f"It has {_listed(sources[name].kinds)}",
                )
    held_out = open_sources(config.eval.sources)
    for kind in config.eval.kinds if held_out else ():
        if not any(source.kinds.get(kind) for source in held_out.values()):
            there = {kind for source in held_out.values() for kind in source.kinds}
            raise UserError(
                "config eval.kinds has a caption kind that no evaluation source has", kind, f"There is {_listed(there)}"
            )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def training_plan(config: Config, sources: Mapping[str, Source]) -> Plan:
    """Which records are in which step of a run."""
    sizes = {name: len(source) for name, source in sources.items()}
    return Plan(config.seed, Steps(config.seed, config.batch_shapes), sizes, mixture_counts(config.data.mixture))


def training_batches(
    config: Config,
    rows_of: Callable[[int], Sequence[int] | np.ndarray],
    start_step: int,
    tokenizer: Tokenizer | None = None,
    skips: Skips | None = None,
) -> Batches:
    """The batches of steps start_step, start_step + 1, … without end.

    Args:
      config: the run's config.
      rows_of: from the size of a global batch to those of its rows that this process holds, in the order in which it
        wants them; `range` for all.
      start_step: the first step.
      tokenizer: without one, `tokens` and `token_valid` are zero.
      skips: batches that no step has; `HostBatch.step` is the number of the batch.

    Raises:
      UserError: if a source cannot be read.
    """
    sources = open_sources(config.data.sources)
    data, patch_size = config.data, config.model.patch_size
    view: View = TrainingView(config.seed, data.image_size, data.crop_area, data.crop_ratio, data.flip)
    if data.areas:
        view = NativeView(config.seed, patch_size, data.upscale, data.flip)
    sizes = {shape.examples for shape in config.batch_shapes}
    build = TrainingBatches(
        training_plan(config, sources),
        sources,
        {size: tuple(int(row) for row in rows_of(size)) for size in sizes},
        view,
        patch_size,
        # Worker i of n builds every n-th batch. Threads of one process wait for one another: there no read is quick.
        ReadAhead(data.read_threads, data.workers or None, QUICK_S if data.workers else 0.0),
    )
    tokenise = _Tokenise(tokenizer, config.model.decoder.text_length)
    return Batches(_OfStep(build, skips or Skips()), range(start_step, _ENDLESS), tokenise, data.workers, data.prefetch)


def evaluation_batches(
    config: Config, rows: Sequence[int] | np.ndarray, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[str, HostBatch]]:
    """The held-out batches of each caption kind in turn, the same at every call; `step` counts the kind's batches.

    Each kind sees all records (the first `eval.max_examples`) of the sources that have it, numbered from 0. Unusable
    records and the tail of the last batch are rows whose `valid` and `token_valid` are all False.
    """
    sources = open_sources(config.eval.sources)
    limit, area, patch_size = config.eval.max_examples, config.eval.area, config.model.patch_size
    view: View = CenterView(config.data.image_size)
    if area is not None:
        view = NativeView(config.seed, patch_size, config.data.upscale)
    for kind in config.eval.kinds:
        counts = {name: len(source) for name, source in sources.items() if source.kinds.get(kind)}
        build = EvaluationBatches(
            sources,
            tuple((name, count if limit is None else min(count, limit)) for name, count in counts.items()),
            kind,
            config.eval.batch_size,
            tuple(int(row) for row in rows),
            view,
            area or config.num_patches,
            patch_size,
            ReadAhead(config.data.read_threads),
        )
        tokenise = _Tokenise(tokenizer, config.model.decoder.text_length)
        # In threads of this process: an evaluation is short, and starting workers for each would cost seconds.
        with Batches(build, range(len(build)), tokenise, workers=0, prefetch=config.data.prefetch) as batches:
            for batch in batches:
                yield kind, batch


@dataclasses.dataclass(frozen=True)
class _OfStep:
    """step -> this process' rows of the batch that it trains on."""

    build: Callable[[int], LocalBatch]
    skips: Skips

    def __call__(self, step: int) -> LocalBatch:
        return self.build(self.skips.batch(step))


@dataclasses.dataclass(frozen=True)
class _Tokenise:
    tokenizer: Tokenizer | None
    length: int

    def __call__(self, batch: LocalBatch) -> HostBatch:
        shape, seconds = (len(batch.captions), self.length), batch.seconds
        tokens, token_valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
        if self.tokenizer is not None:
            start = time.perf_counter()
            tokens, token_valid = self.tokenizer.encode(batch.captions)
            seconds = seconds | {"tokenise": time.perf_counter() - start}
        arrays = batch.arrays | {"tokens": tokens, "token_valid": token_valid}
        return HostBatch(batch.step, arrays, batch.faults, seconds)


class Batches(contextlib.AbstractContextManager):
    """Finished batches, in order, a few of them ready ahead. Close it: workers and memory are gone when that returns.

    An error while a batch is built is raised where that batch would have come.

    Args:
      build: number -> that batch; sent to the workers.
      numbers: the batches to give.
      finish: what remains to be done in this process, in a background thread.
      workers: processes that build, each a whole batch at a time; 0: threads of this process.
      prefetch: batches that each worker keeps ready.
    """

    def __init__(
        self,
        build: Callable[[int], LocalBatch],
        numbers: range,
        finish: Callable[[LocalBatch], HostBatch],
        workers: int,
        prefetch: int,
    ):
        self._finish = finish
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(_FINISHED_BATCHES)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(_read_ahead(build, numbers, workers, prefetch),), name="batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> HostBatch:
        if self._ended is None:
            item = self._ready.get()
            if isinstance(item, HostBatch):
                return item
            self._ended = item
        raise self._ended

    @property
    def depth(self) -> int:
        """Finished batches that wait for the consumer."""
        return self._ready.qsize()

    def close(self) -> None:
        """Ends the thread and the workers; waits for the batches that are being built."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        self._ended = self._ended or StopIteration()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, dataset: grain.IterDataset) -> None:
        """The thread: the only one that touches grain's iterator."""
        end: BaseException = StopIteration()
        try:
            with contextlib.closing(iter(dataset)) as iterator:
                while not self._stop.is_set() and (element := next(iterator, None)) is not None:
                    # Copied out of shared memory, so that its segments can go at once.
                    arrays = {name: np.array(array) for name, array in sorted(element["arrays"].items())}
                    self._put(self._finish(LocalBatch(**element | {"arrays": arrays})))
        except BaseException as error:  # The consumer's to handle: raised there, in its turn.
            end = _readable(error)
        self._put(end)

    def _put(self, item: HostBatch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.1)


def builders(workers: int) -> int:
    """How many batches are built at a time: by `workers` processes, or where there are none by threads."""
    return workers or min(_MAX_THREADS, cores())


def _read_ahead(
    build: Callable[[int], LocalBatch], numbers: range, workers: int, prefetch: int
) -> grain.IterDataset[dict[str, Any]]:
    """Builds batch after batch of `numbers`, in order, ahead of who asks for them."""
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only `app.run` parses.
        flags.FLAGS.mark_as_parsed()
    steps = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(_Fields(build))
    if not workers:
        threads = builders(0)
        return steps.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        )
    # A worker builds one batch after another: parallelism is the number of workers, memory the batches they hold.
    steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return steps.mp_prefetch(options, worker_init_fn=start_reader)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A batch as a dict, whose arrays grain then hands over in shared memory."""

    build: Callable[[int], LocalBatch]

    def __call__(self, step: int) -> dict[str, Any]:
        batch = self.build(step)
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _readable(error: BaseException) -> BaseException:
    if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
        return UserError(
            "a data worker died",
            str(error).split(". ")[0],
            "Exit code -9 is mostly the system's want of memory: lower data.workers or data.prefetch",
        )
    return error


def to_devices(
    arrays: Mapping[str, np.ndarray], sharding: jax.sharding.NamedSharding, rows: Sequence[int], global_rows: int
) -> dict[str, jax.Array]:
    """Global arrays of `global_rows` rows, of which this process gives `rows` (in the order of `arrays`).

    `sharding` splits the leading axis; every row that it puts on a device of this process must be among `rows`.
    """
    import jax

    place = np.full(global_rows, -1)
    place[np.asarray(rows)] = np.arange(len(rows))

    def globally(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            places = place[index[0]]
            assert (places >= 0).all(), "a device's rows were not read by its process"
            return local[(places, *index[1:])]

        return jax.make_array_from_callback((global_rows, *local.shape[1:]), sharding, part)

    with jax.transfer_guard("allow"):  # The one place where a batch crosses over, so this transfer is meant.
        return {name: globally(array) for name, array in arrays.items()}
