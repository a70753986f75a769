"""Batch iterator: batches built ahead in workers or threads, and finished in a thread of the trainer.

A worker that dies or stalls costs only time: a batch is a function of its number, so new workers continue from the
batch that was awaited.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import sys
import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from aimv2_jax.data.loading.batch_builder import BadExample, LocalBatch
from aimv2_jax.data.loading.dataset import Build
from aimv2_jax.data.loading.pools import ThreadPool, WorkerFailure, WorkerPool
from aimv2_jax.errors import UserError

_FINISHED_BATCHES = 2  # Batches that the finishing thread keeps ready, besides those of the workers.

BOOKKEEPING = ("source", "faults", "truncated", "read_retries")


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This process's rows of a batch.

    `arrays`: `patches [b L P] uint8`, `coords [b L 2] int32`, `valid [b L] bool`, `tokens [b T] int32`,
    `token_valid [b T] bool`, `example_index [b 2] uint32` (high and low word of the example number),
    `source [b] int32` (index into the config's list of sources), `faults [b R] int32` (unusable records that the
    example drew, by `REASONS`), `truncated [b] bool` (captions with more pieces than fit), `read_retries [b] int32`
    (reads of the data that were retried, in any row), and with a teacher of another resolution `teacher_patches
    [b S P] uint8`; `BOOKKEEPING` names those that no model reads. `seconds` is the time spent in each stage of
    building, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    faults: list[BadExample]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class BatchIterator(contextlib.AbstractContextManager):
    """Finished batches in order, a few of them ready ahead. `close` returns after workers and memory are freed.

    An error while a batch is built is raised in place of that batch. When a worker dies or stalls, this is reported
    and all workers restart from the batch that it owed. A second death on the same batch is an error. A second stall
    is left to the watchdog.

    Args:
      build: number -> that batch; sent to the workers.
      numbers: the batches to return.
      finish: the rest of the work on a batch, done in a background thread of this process.
      workers: processes that each build whole batches; 0: threads of this process.
      prefetch: batches that each worker keeps ready.
      stall_s: a worker whose batch is awaited has stalled after this long without a status update; 0: never.
      on_restart: called, from a thread, with every failure after which workers restart.
    """

    def __init__(
        self,
        build: Build,
        numbers: range,
        finish: Callable[[LocalBatch], HostBatch],
        workers: int,
        prefetch: int,
        stall_s: float = 0.0,
        on_restart: Callable[[WorkerFailure], None] | None = None,
    ):
        self._new_pool: Callable[..., WorkerPool | ThreadPool] = (
            partial(WorkerPool, build, workers=workers, prefetch=prefetch)
            if workers
            else partial(ThreadPool, build, prefetch=prefetch)
        )
        self._numbers = numbers
        self._finish = finish
        self._stall_s = stall_s
        self._on_restart = on_restart
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(_FINISHED_BATCHES)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._pool: WorkerPool | ThreadPool | None = None
        self._failed_at: int | None = None  # The batch that was awaited at the last worker failure.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # Otherwise multiprocessing waits for workers that ignore its SIGTERM.

    def __iter__(self) -> BatchIterator:
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
        """Number of finished batches that wait for the consumer."""
        return self._ready.qsize()

    def last_read(self) -> str:
        """The activity of each worker, or of the threads that build, with record and shard, one line each."""
        return "\n".join([] if self._pool is None else self._pool.describe())

    def close(self) -> None:
        """Ends the thread and the workers; waits for the batches that threads are building."""
        self._stop.set()
        while self._thread.is_alive():
            if self._pool is not None:
                self._pool.kill()
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        self._ended = self._ended or StopIteration()
        atexit.unregister(self.close)

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        """Body of the background thread."""
        end: BaseException = StopIteration()
        try:
            remaining = self._numbers
            while remaining and not self._stop.is_set():
                remaining = self._consume(remaining)
        except BaseException as error:  # Raised to the consumer in place of the batch.
            end = error
        self._put(end)

    def _consume(self, remaining: range) -> range:
        """Puts batches until none is left or a worker fails; returns the numbers that remain."""
        self._pool = pool = self._new_pool(numbers=remaining)
        try:
            while remaining and not self._stop.is_set():
                item = pool.take(0.0 if remaining[0] == self._failed_at else self._stall_s)
                if isinstance(item, WorkerFailure):
                    if not self._stop.is_set():  # `close` kills the workers.
                        self._handle_failure(item)
                    break
                self._put(self._finish(item))
                remaining = remaining[1:]
        finally:
            pool.close()
        return remaining

    def _handle_failure(self, failure: WorkerFailure) -> None:
        if failure.number == self._failed_at:
            raise UserError(
                "a data worker died twice over the same batch",
                str(failure),
                "Exit code -9 usually means the OOM killer: lower data.workers or data.prefetch",
            )
        self._failed_at = failure.number
        print(f"{failure}; restarting the workers from that batch", file=sys.stderr, flush=True)
        if self._on_restart is not None:
            self._on_restart(failure)

    def _put(self, item: HostBatch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.1)
