"""Batches ahead of who takes them: built in workers, or in threads, and finished in a thread of the trainer.

A worker that dies or stalls costs nothing but time: a batch is a function of its number, so that new workers go on from
the one that was awaited.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import numpy as np
from absl import flags

from aimv2_jax.data import whereabouts
from aimv2_jax.data.batches import Fault, LocalBatch
from aimv2_jax.data.workers import (
    announce_semaphores,
    clear_up,
    cores,
    no_room_error,
    reading,
    remedy_for,
    start_reader,
    write_stacks,
)
from aimv2_jax.errors import UserError

_FINISHED_BATCHES = 2  # Kept ready by the thread, beside what the workers keep.
_MAX_THREADS = 4  # That build batches in the trainer itself, where there are no workers.
_BEGIN_S = (
    60.0  # That a worker may take for imports before its first batch, beyond the time after which one has stalled.
)
_CLOSE_S = 30.0  # For grain to end the other workers, when one has failed; it gives each 25 s.


BOOKKEEPING = ("source", "faults", "truncated")


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This process' rows of a batch.

    `arrays`: `patches [b L P] uint8`, `coords [b L 2] int32`, `valid [b L] bool`, `tokens [b T] int32`,
    `token_valid [b T] bool`, `example_index [b 2] uint32` (high and low word of the example's number),
    `source [b] int32` (place in the config's list of sources), `faults [b R] int32` (records that the example met and
    could not use, by `REASONS`), `truncated [b] bool` (captions with more pieces than fit); `BOOKKEEPING` names those
    that no model reads. `seconds` is the time that each stage of building took, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    faults: list[Fault]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A worker that died or stalled.

    Args:
      number: of the batch that it owed.
      worker: its place among `count`.
      pid: its process id; 0 where it had not begun.
      what: what happened to it, with its exit code where it has one.
      at: the record and shard that it was at.
      exit_code: with which it died, where that is known.
    """

    number: int
    worker: int
    count: int
    pid: int
    what: str
    at: str
    exit_code: int | None = None

    def __str__(self) -> str:
        return (
            f"data worker {self.worker} of {self.count} (process {self.pid}) {self.what} while batch {self.number} was "
            f"awaited; it {self.at}"
        )


class Batches(contextlib.AbstractContextManager):
    """Finished batches, in order, a few of them ready ahead. Close it: workers and memory are gone when that returns.

    An error while a batch is built is raised where that batch would have come. A worker that dies or stalls is
    reported, and all are started again from the batch that it owed; where one dies twice over the same batch, that is
    an error, too. One that stalls twice is left to who waits for the batch.

    Args:
      build: number -> that batch; sent to the workers.
      numbers: the batches to give.
      finish: what remains to be done in this process, in a background thread.
      workers: processes that build, each a whole batch at a time; 0: threads of this process.
      prefetch: batches that each worker keeps ready.
      stall_s: a worker whose batch is awaited has stalled if it notes nothing for so long; 0: never.
      on_restart: told of every failure after which workers are started again, from a thread.
    """

    def __init__(
        self,
        build: Callable[[int], LocalBatch],
        numbers: range,
        finish: Callable[[LocalBatch], HostBatch],
        workers: int,
        prefetch: int,
        stall_s: float = 0.0,
        on_restart: Callable[[Failure], None] | None = None,
    ):
        self._new_crew = partial(_Crew, build, workers=workers, prefetch=prefetch)
        self._numbers, self._finish = numbers, finish
        self._stall_s, self._on_restart = stall_s, on_restart
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(_FINISHED_BATCHES)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._crew: _Crew | None = None
        self._failed_at: int | None = None  # The batch that was awaited when a worker failed last.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()
        if workers and stall_s:
            threading.Thread(target=self._watch, name="stalls", daemon=True).start()

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

    def last_read(self) -> str:
        """What each worker is at, and what threads of this process are: a line each, with record and shard."""
        crew = self._crew
        lines = [] if crew is None else crew.told()
        return "\n".join([*lines, f"threads of the trainer: {whereabouts.mine().told()}"])

    def close(self) -> None:
        """Ends the thread and the workers; waits for the batches that are being built."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        self._ended = self._ended or StopIteration()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        """The thread: the only one that touches grain's iterator."""
        end: BaseException = StopIteration()
        try:
            left = self._numbers
            while left and not self._stop.is_set():
                left = self._take(left)
        except BaseException as error:  # The consumer's to handle: raised there, in its turn.
            end = error
        self._put(end)

    def _take(self, left: range) -> range:
        """Puts batches of `left`, until none is left or a worker fails; those that remain."""
        self._crew = crew = self._new_crew(left)
        try:
            while left and not self._stop.is_set():
                item = crew.take()
                assert item is not None
                if isinstance(item, Failure):
                    self._failed(item)
                    break
                self._put(self._finish(item))
                left = left[1:]
        finally:
            crew.close()
        return left

    def _failed(self, failure: Failure) -> None:
        if failure.number == self._failed_at:
            what = "a data worker died twice over the same batch"
            raise UserError(what, str(failure), remedy_for(failure.exit_code))
        self._failed_at = failure.number
        print(f"{failure}; the workers are started again from that batch", file=sys.stderr, flush=True)
        if self._on_restart is not None:
            self._on_restart(failure)

    def _watch(self) -> None:
        """The thread that looks for stalls."""
        while not self._stop.wait(min(1.0, self._stall_s / 10)) and self._thread.is_alive():
            crew = self._crew
            failure = None if crew is None else crew.stalled(self._stall_s)
            if crew is not None and failure is not None and failure.number != self._failed_at:
                crew.end(failure)

    def _put(self, item: HostBatch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.1)


class _Crew:
    """The workers, or threads, that build batches of `numbers`, and what each of the workers is at."""

    def __init__(self, build: Callable[[int], LocalBatch], numbers: range, workers: int, prefetch: int):
        announce_semaphores()
        self._desk = whereabouts.Desk(workers) if workers else None
        self._count, self._numbers = workers, numbers
        self._iterator = iter(_read_ahead(build, numbers, workers, prefetch, self._desk))
        self._taken = 0
        self._awaited_s: float | None = None  # Since when a batch is awaited.
        self._failure: Failure | None = None

    def take(self) -> LocalBatch | Failure | None:
        """The next batch, or what became of the worker that owed it; None after the last; raises as building does."""
        self._awaited_s = time.monotonic()
        try:
            element = next(self._iterator, None)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            found = re.search(r"exit code (-?\d+)", str(error))
            code = int(found[1]) if found else None
            told = "unknown" if code is None else code
            self._failure = self._failure or self._fails(f"died with exit code {told}", code)
            return self._failure
        except OSError as error:
            if error.errno == errno.ENOSPC and self._desk is not None:
                raise no_room_error(error) from error
            raise
        finally:
            self._awaited_s = None
        if element is None:
            return None
        self._taken += 1
        # Copied out of shared memory, so that its segments can go at once.
        arrays = {name: np.array(array) for name, array in sorted(element["arrays"].items())}
        return LocalBatch(arrays=arrays, **pickle.loads(element["rest"].tobytes()))

    def stalled(self, stall_s: float) -> Failure | None:
        """The failure of the worker that owes the next batch, if it has noted nothing for so long."""
        since_s, desk = self._awaited_s, self._desk
        if since_s is None or desk is None or self._failure is not None:
            return None
        notes = desk.workers[self._taken % self._count]
        silence_s = time.monotonic() - max(since_s, notes.changed_s)
        begun = self._taken >= self._count or notes.read()
        if silence_s < stall_s + (0 if begun else _BEGIN_S):
            return None
        return self._fails(f"has stalled for {silence_s:.0f} s")

    def end(self, failure: Failure) -> None:
        """Ends all workers, one of which has failed, after a look at its stacks; grain notices."""
        self._failure = failure
        write_stacks(failure.pid)
        self._kill()

    def told(self) -> list[str]:
        """What each worker is at."""
        notes = [] if self._desk is None else self._desk.workers
        return [f"data worker {index} (process {one.pid}): {one.told()}" for index, one in enumerate(notes)]

    def close(self) -> None:
        """Ends the workers, and frees all that they shared: what each was at can still be told."""
        iterator, self._iterator = self._iterator, iter(())  # It holds batches.
        if self._failure is None:
            iterator.close()
        else:
            # It may wait for ever, for a lock that a killed worker held.
            closing = threading.Thread(target=iterator.close, name="ending workers", daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
            self._kill()
        del iterator
        gc.collect()  # Grain's objects form cycles, and have hold of batches in shared memory.
        if self._desk is not None:
            self._desk.close()
            if self._failure is not None:
                clear_up(self._desk.name)

    def _fails(self, what: str, exit_code: int | None = None) -> Failure:
        assert self._desk is not None
        worker = self._taken % self._count  # Grain takes from one after another.
        notes = self._desk.workers[worker]
        number = self._numbers[self._taken]
        return Failure(number, worker, self._count, notes.pid, what, notes.told(), exit_code)

    def _kill(self) -> None:
        assert self._desk is not None
        mine = {notes.pid for notes in self._desk.workers}
        for pid in mine.intersection(reading()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def builders(workers: int) -> int:
    """How many batches are built at a time: by `workers` processes, or where there are none by threads."""
    return workers or min(_MAX_THREADS, cores())


def _read_ahead(
    build: Callable[[int], LocalBatch], numbers: range, workers: int, prefetch: int, desk: whereabouts.Desk | None
) -> grain.IterDataset[dict[str, Any]]:
    """Builds batch after batch of `numbers`, in order, ahead of who asks for them."""
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only `app.run` parses.
        flags.FLAGS.mark_as_parsed()
    steps = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(_Fields(build))
    if desk is None:
        threads = builders(0)
        return steps.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        )
    # A worker builds one batch after another: parallelism is the number of workers, memory the batches they hold.
    steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return steps.mp_prefetch(options, worker_init_fn=partial(start_reader, desk=desk.name))


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A batch as arrays alone, which grain hands over in shared memory.

    What goes through a pipe is their names: so little that it is written at once. Of a longer message, such as many
    captions, a worker that is killed could leave a half, for whose rest grain would wait for ever.
    """

    build: Callable[[int], LocalBatch]

    def __call__(self, step: int) -> dict[str, Any]:
        batch = self.build(step)
        rest = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        arrays = rest.pop("arrays")
        return {"arrays": arrays, "rest": np.frombuffer(pickle.dumps(rest), np.uint8)}
