"""Batch iterator: batches built ahead in workers or threads, and finished in a thread of the trainer.

A worker that dies or stalls costs only time: a batch is a function of its number, so new workers continue from the
batch that was awaited.
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

from aimv2_jax.data.loading import worker_status
from aimv2_jax.data.loading.batch_builder import BadExample, LocalBatch
from aimv2_jax.data.loading.workers import (
    cores,
    live_worker_pids,
    no_room_error,
    remedy_for,
    start_data_worker,
    track_semaphores,
    unlink_shared_memory,
    write_stacks,
)
from aimv2_jax.errors import UserError

_FINISHED_BATCHES = 2  # Batches that the finishing thread keeps ready, besides those of the workers.
_MAX_THREADS = 4  # Threads that build batches in the trainer itself when there are no workers.
_WORKER_STARTUP_S = 60.0  # Extra time for a worker's imports before its first batch, on top of the stall timeout.
_CLOSE_S = 30.0  # Time for grain to end the other workers when one has failed; it gives each 25 s.


BOOKKEEPING = ("source", "faults", "truncated")


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """This process's rows of a batch.

    `arrays`: `patches [b L P] uint8`, `coords [b L 2] int32`, `valid [b L] bool`, `tokens [b T] int32`,
    `token_valid [b T] bool`, `example_index [b 2] uint32` (high and low word of the example number),
    `source [b] int32` (index into the config's list of sources), `faults [b R] int32` (unusable records that the
    example drew, by `REASONS`), `truncated [b] bool` (captions with more pieces than fit); `BOOKKEEPING` names those
    that no model reads. `seconds` is the time spent in each stage of building, by name.
    """

    step: int
    arrays: dict[str, np.ndarray]
    faults: list[BadExample]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WorkerFailure:
    """A worker that died or stalled.

    Args:
      number: the batch that it owed.
      worker: its index among `count`.
      pid: its process id; 0 if it had not started.
      what: what happened to it, with its exit code if it has one.
      at: its last activity, with record and shard.
      exit_code: its exit code, if known.
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
        build: Callable[[int], LocalBatch],
        numbers: range,
        finish: Callable[[LocalBatch], HostBatch],
        workers: int,
        prefetch: int,
        stall_s: float = 0.0,
        on_restart: Callable[[WorkerFailure], None] | None = None,
    ):
        self._new_pool = partial(_WorkerPool, build, workers=workers, prefetch=prefetch)
        self._numbers = numbers
        self._finish = finish
        self._stall_s = stall_s
        self._on_restart = on_restart
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(_FINISHED_BATCHES)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._pool: _WorkerPool | None = None
        self._failed_at: int | None = None  # The batch that was awaited at the last worker failure.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()
        if workers and stall_s:
            threading.Thread(target=self._watch_stalls, name="stalls", daemon=True).start()

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
        """The activity of each worker and of this process's threads, with record and shard, one line each."""
        pool = self._pool
        lines = [] if pool is None else pool.describe()
        return "\n".join([*lines, f"threads of the trainer: {worker_status.this_process().describe()}"])

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
        """Body of the background thread, the only one that touches grain's iterator."""
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
        self._pool = pool = self._new_pool(remaining)
        try:
            while remaining and not self._stop.is_set():
                item = pool.take()
                assert item is not None
                if isinstance(item, WorkerFailure):
                    self._handle_failure(item)
                    break
                self._put(self._finish(item))
                remaining = remaining[1:]
        finally:
            pool.close()
        return remaining

    def _handle_failure(self, failure: WorkerFailure) -> None:
        if failure.number == self._failed_at:
            what = "a data worker died twice over the same batch"
            raise UserError(what, str(failure), remedy_for(failure.exit_code))
        self._failed_at = failure.number
        print(f"{failure}; restarting the workers from that batch", file=sys.stderr, flush=True)
        if self._on_restart is not None:
            self._on_restart(failure)

    def _watch_stalls(self) -> None:
        """Body of the thread that ends the workers when one stalls."""
        while not self._stop.wait(min(1.0, self._stall_s / 10)) and self._thread.is_alive():
            pool = self._pool
            failure = None if pool is None else pool.find_stall(self._stall_s)
            if pool is not None and failure is not None and failure.number != self._failed_at:
                pool.abort(failure)

    def _put(self, item: HostBatch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.1)


class _WorkerPool:
    """The workers, or threads, that build the batches `numbers`, and the status of each worker."""

    def __init__(self, build: Callable[[int], LocalBatch], numbers: range, workers: int, prefetch: int):
        track_semaphores()
        self._board = worker_status.StatusBoard(workers) if workers else None
        self._count = workers
        self._numbers = numbers
        self._iterator = iter(_prefetch_dataset(build, numbers, workers, prefetch, self._board))
        self._taken = 0
        self._awaited_since_s: float | None = None  # Set while `take` waits for a batch.
        self._failure: WorkerFailure | None = None

    def take(self) -> LocalBatch | WorkerFailure | None:
        """The next batch, or the failure of the worker that owed it; None after the last; raises building errors."""
        self._awaited_since_s = time.monotonic()
        try:
            element = next(self._iterator, None)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            match = re.search(r"exit code (-?\d+)", str(error))
            exit_code = int(match[1]) if match else None
            code_text = "unknown" if exit_code is None else exit_code
            self._failure = self._failure or self._make_failure(f"died with exit code {code_text}", exit_code)
            return self._failure
        except OSError as error:
            if error.errno == errno.ENOSPC and self._board is not None:
                raise no_room_error(error) from error
            raise
        finally:
            self._awaited_since_s = None
        if element is None:
            return None
        self._taken += 1
        # Copied out of shared memory, so that its segments are freed at once.
        arrays = {name: np.array(array) for name, array in sorted(element["arrays"].items())}
        return LocalBatch(arrays=arrays, **pickle.loads(element["rest"].tobytes()))

    def find_stall(self, stall_s: float) -> WorkerFailure | None:
        """The failure of the worker that owes the next batch, if its status has not changed for `stall_s`."""
        since_s = self._awaited_since_s
        if since_s is None or self._board is None or self._failure is not None:
            return None
        status = self._board.workers[self._taken % self._count]
        silence_s = time.monotonic() - max(since_s, status.last_update_s)
        started = self._taken >= self._count or status.read()
        if silence_s < stall_s + (0 if started else _WORKER_STARTUP_S):
            return None
        return self._make_failure(f"has stalled for {silence_s:.0f} s")

    def abort(self, failure: WorkerFailure) -> None:
        """Dumps the stacks of the failed worker and kills all workers; grain then raises in `take`."""
        self._failure = failure
        write_stacks(failure.pid)
        self._kill()

    def describe(self) -> list[str]:
        """The activity of each worker, one line each."""
        workers = [] if self._board is None else self._board.workers
        return [
            f"data worker {index} (process {status.pid}): {status.describe()}" for index, status in enumerate(workers)
        ]

    def close(self) -> None:
        """Ends the workers and frees their shared memory; `describe` keeps working."""
        # The iterator holds batches: this object must not keep it alive.
        iterator = self._iterator
        self._iterator = iter(())
        if self._failure is None:
            iterator.close()
        else:
            # Closing may wait forever for a lock that a killed worker held.
            closing = threading.Thread(target=iterator.close, name="ending workers", daemon=True)
            closing.start()
            closing.join(_CLOSE_S)
            self._kill()
        del iterator
        gc.collect()  # Grain's objects form reference cycles and hold batches in shared memory.
        if self._board is not None:
            self._board.close()
            if self._failure is not None:
                unlink_shared_memory(self._board.name)

    def _make_failure(self, what: str, exit_code: int | None = None) -> WorkerFailure:
        assert self._board is not None
        worker = self._taken % self._count  # Grain takes batches from the workers in turn.
        status = self._board.workers[worker]
        number = self._numbers[self._taken]
        return WorkerFailure(number, worker, self._count, status.pid, what, status.describe(), exit_code)

    def _kill(self) -> None:
        assert self._board is not None
        own_pids = {status.pid for status in self._board.workers}
        for pid in own_pids.intersection(live_worker_pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def builders(workers: int) -> int:
    """Number of batches built at a time: by `workers` processes, or by threads if there are none."""
    return workers or min(_MAX_THREADS, cores())


def _prefetch_dataset(
    build: Callable[[int], LocalBatch],
    numbers: range,
    workers: int,
    prefetch: int,
    board: worker_status.StatusBoard | None,
) -> grain.IterDataset[dict[str, Any]]:
    """Builds the batches `numbers` in order, ahead of the consumer."""
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only `app.run` parses.
        flags.FLAGS.mark_as_parsed()
    steps = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step).map(_BuildAsArrays(build))
    if board is None:
        threads = builders(0)
        return steps.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        )
    # A worker builds one batch after another: parallelism is the number of workers, memory the batches they hold.
    steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return steps.mp_prefetch(options, worker_init_fn=partial(start_data_worker, board=board.name))


@dataclasses.dataclass(frozen=True)
class _BuildAsArrays:
    """Builds a batch as arrays only, which grain passes through shared memory.

    The pipe then carries only their names, a message small enough for one atomic write. A longer message, such as many
    captions, could be left half written by a killed worker, and grain would wait forever for the rest.
    """

    build: Callable[[int], LocalBatch]

    def __call__(self, step: int) -> dict[str, Any]:
        batch = self.build(step)
        rest = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        arrays = rest.pop("arrays")
        return {"arrays": arrays, "rest": np.frombuffer(pickle.dumps(rest), np.uint8)}
