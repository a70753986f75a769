"""Worker processes, or threads of the trainer, that build the batches of given numbers ahead of the consumer."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import pickle
import socket
import time
from functools import partial
from typing import IO, Any

import grain

from aimv2_jax.data.loading.batch_builder import LocalBatch
from aimv2_jax.data.loading.dataset import Build, batch_dataset
from aimv2_jax.data.loading.shared_files import anonymous_file, map_file, receive_file, send_file
from aimv2_jax.data.loading.worker_status import STATUS_BYTES, WorkerStatus
from aimv2_jax.data.loading.workers import NAME, REQUEST, cores, run_worker, write_stacks

_MAX_THREADS = 4  # Threads that build batches in the trainer itself when there are no workers.
_WORKER_STARTUP_S = 60.0  # Extra time for a worker's imports before its first batch, on top of the stall timeout.
_JOIN_S = 5.0  # Time for killed workers to end. One that waits for a disk in the kernel ends when the disk answers.


@dataclasses.dataclass(frozen=True)
class WorkerFailure:
    """A worker that died or stalled.

    Args:
      number: the batch that it owed.
      worker: its index among `count`.
      pid: its process id.
      what: what happened to it, with its exit code if it has one.
      at: its last activity, with record and shard.
    """

    number: int
    worker: int
    count: int
    pid: int | None
    what: str
    at: str

    def __str__(self) -> str:
        return (
            f"data worker {self.worker} of {self.count} (process {self.pid}) {self.what} while batch {self.number} was "
            f"awaited; it {self.at}"
        )


def builders(workers: int) -> int:
    """Number of batches built at a time: by `workers` processes, or by threads if there are none."""
    return workers or min(_MAX_THREADS, cores())


class ThreadPool:
    """Threads of this process that build the batches `numbers`, up to `prefetch` of them ahead."""

    def __init__(self, build: Build, numbers: range, prefetch: int):
        threads = builders(0)
        self._status = WorkerStatus()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch))
        self._batches = iter(batch_dataset(build, numbers, self._status).to_iter_dataset(options))

    def take(self, stall_s: float = 0.0) -> LocalBatch:
        """The next batch; raises the error of building it."""
        return next(self._batches)

    def describe(self) -> list[str]:
        """The activity of the threads, in one line."""
        return [f"threads of the trainer: {self._status.describe()}"]

    def kill(self) -> None:
        """Does nothing: a thread cannot be ended, and `close` waits for the batches that are being built."""

    def close(self) -> None:
        self._batches.close()


class WorkerPool:
    """Processes that build the batches `numbers` in turn, each up to `prefetch` of them ahead."""

    def __init__(self, build: Build, numbers: range, workers: int, prefetch: int):
        self._numbers = numbers
        self._taken = 0
        max_ahead = prefetch + 1  # A worker builds one more than it keeps ready.
        self._ahead = workers * max_ahead
        with anonymous_file() as file:
            pickle.dump(partial(batch_dataset, build, numbers), file)
            self._workers: list[_Worker] = []
            with contextlib.ExitStack() as on_error:
                on_error.callback(self.close)
                for index in range(workers):
                    self._workers.append(_Worker(index, max_ahead))
                    self._workers[-1].set_up(file)
                on_error.pop_all()
        for position in range(self._ahead):
            self._request(position)

    def take(self, stall_s: float = 0.0) -> LocalBatch | WorkerFailure:
        """The next batch; raises the error of building it.

        The result is a `WorkerFailure` if the worker that owes the batch has died, or, after its stacks are in the log,
        if its status has not changed for `stall_s` since the call (0: any time).
        """
        worker = self._workers[self._taken % len(self._workers)]
        begin_s = time.monotonic()
        while not worker.wait(min(1.0, stall_s / 10) or None):
            silence_s = time.monotonic() - max(begin_s, worker.status.last_update_s)
            started = self._taken >= len(self._workers) or worker.status.read()
            if silence_s >= stall_s + (0 if started else _WORKER_STARTUP_S):
                write_stacks(worker.process.pid)
                return self._failure(worker, f"has stalled for {silence_s:.0f} s")
        result = worker.receive()
        if result is None:
            worker.process.join(_JOIN_S)
            code = worker.process.exitcode
            return self._failure(worker, f"died with exit code {'unknown' if code is None else code}")
        if isinstance(result, Exception):
            raise result
        self._request(self._taken + self._ahead)
        self._taken += 1
        return result

    def describe(self) -> list[str]:
        """The activity of each worker, one line each."""
        return [
            f"{NAME} {index} (process {worker.process.pid}): {worker.status.describe()}"
            for index, worker in enumerate(self._workers)
        ]

    def kill(self) -> None:
        """Kills the workers, which makes `take` return. They hold nothing that the kernel does not free."""
        for worker in self._workers:
            worker.process.kill()

    def close(self) -> None:
        """Ends the workers; `describe` keeps working."""
        self.kill()
        deadline_s = time.monotonic() + _JOIN_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline_s - time.monotonic()))
            worker.channel.close()

    def _request(self, position: int) -> None:
        if position < len(self._numbers):
            self._workers[position % len(self._workers)].request(position)

    def _failure(self, worker: _Worker, what: str) -> WorkerFailure:
        number = self._numbers[self._taken]
        index = self._workers.index(worker)
        return WorkerFailure(number, index, len(self._workers), worker.process.pid, what, worker.status.describe())


class _Worker:
    """A started worker process, the trainer's end of its channel, and its status."""

    def __init__(self, index: int, max_ahead: int):
        self._status_file = anonymous_file()
        self._status_file.truncate(STATUS_BYTES)
        self.status = WorkerStatus(map_file(self._status_file))
        self.channel, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=run_worker, args=(theirs, max_ahead), name=f"{NAME} {index}", daemon=True)
        self.process.start()
        theirs.close()

    def set_up(self, open_batches: IO[bytes]) -> None:
        """Sends what `run_worker` needs first. If the worker has died, `receive` returns None."""
        with self._status_file, contextlib.suppress(ConnectionError):
            send_file(self.channel, self._status_file)
            send_file(self.channel, open_batches)

    def request(self, position: int) -> None:
        """Requests the batch at that position. If the worker has died, `receive` returns None."""
        with contextlib.suppress(ConnectionError):
            self.channel.sendall(REQUEST.pack(position))

    def wait(self, timeout_s: float | None) -> bool:
        """Waits until there is something to receive or the worker has died; False after `timeout_s` without either."""
        return bool(multiprocessing.connection.wait([self.channel, self.process.sentinel], timeout_s))

    def receive(self) -> Any:
        """The next batch, or the exception that ended its building; None if the worker has died."""
        # Another process may have inherited the worker's end of the channel, which then stays open.
        pickled = receive_file(self.channel) if multiprocessing.connection.wait([self.channel], 0) else None
        return None if pickled is None else pickle.loads(pickled)
