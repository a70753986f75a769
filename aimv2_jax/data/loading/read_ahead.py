"""Read-ahead: a thread pool fetches the records of coming examples while earlier ones are decoded.

When every read takes 50 ms (a bucket, a parallel file system), 32 reads at a time are 640 records per second. The
number of reads in flight follows their measured latency. When reads hardly wait (a local disk), handing them to threads
costs more than it saves, and no threads are used.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

MAX_WAITING_BYTES = 64 << 20
"""Limit on the bytes that are fetched or in flight per batch builder and not yet taken."""

QUICK_S = 0.0005
"""A wait this short is not worth hiding: a hand-over to a thread takes 0.1 ms."""

_SLOW_BUDGET_S = 0.02  # Accumulated waiting above `quick_s` before the threads start for good.
_MAX_SLOW_READ_S = _SLOW_BUDGET_S / 4  # Cap per read, so that one hiccup does not start the pool.
_FETCHES_PER_THREAD = 2  # In flight or ready, so that a thread finds work while an image is decoded.
_MARGIN = 2.0  # Fetches in flight or ready, relative to those that are in flight at the mean latency.
_MIN_FETCHES = 4
_MEAN_OF = 32  # Fetches over which latency and demand are averaged.


class Fetch(Protocol):
    """What is fetched for one example."""

    def advance(self) -> None:
        """Fetches the data, in a thread of the pool."""

    @property
    def size(self) -> int:
        """Bytes held after `advance`; the expected number before."""


F = TypeVar("F", bound=Fetch)


class ReadAhead:
    """Runs the fetches of consecutive batches in order, ahead of the consumer.

    Safe to use from several threads, each building its own batch; pickles without its threads.

    Args:
      threads: the maximum of concurrent fetches; 0: the consumer runs each fetch when it takes it.
      stride: after batch n comes batch n + stride, whose fetches start while those of n are still being taken; None:
        the next batch is unknown, and no fetch starts before its batch is requested.
      quick_s: while fetches wait no longer than this, the consumer runs them itself. Their CPU time (copies, checksums
        of large records) does not count, because no thread hides it.
    """

    def __init__(self, threads: int = 0, stride: int | None = None, quick_s: float = 0.0):
        self._threads = threads
        self._stride = stride
        self._quick_s = quick_s
        self._budget_s = _SLOW_BUDGET_S if quick_s else 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._window: _Window | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadAhead, (self._threads, self._stride, self._quick_s)

    def __call__(self, number: int, fetches: Callable[[int], Iterable[F]]) -> Iterator[F]:
        """Yields the completed fetches of batch `number`; the error of a fetch is raised in its turn.

        Args:
          number: the batch.
          fetches: number -> the fetches of that batch, in order; the same at every call.
        """
        rest = iter(fetches(number))
        started = False
        while not self._threads or self._budget_s > 0:
            fetch = next(rest, None)
            if fetch is None:
                return
            start_s = _waited_s()
            fetch.advance()
            excess_s = min(_waited_s() - start_s - self._quick_s, _MAX_SLOW_READ_S)
            self._budget_s = min(self._budget_s - excess_s, _SLOW_BUDGET_S)
            started = True
            yield fetch
        window = self._resume_window(number, rest, fetches, started)
        while window.next_batch() == number:
            yield window.take()
        if self._stride is not None:
            self._window = window

    def _resume_window(
        self, number: int, rest: Iterator[F], fetches: Callable[[int], Iterable[F]], started: bool
    ) -> _Window[F]:
        """The window over the rest of batch `number`: the previous one if it stopped at its start, or a new one."""
        with self._lock:
            window, self._window = self._window, None
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reads")
            pool = self._pool
        if window is not None and not started and window.next_batch() == number:
            return window
        later = itertools.count(number + self._stride, self._stride) if self._stride else ()
        wanted = ((batch, fetch) for batch in later for fetch in fetches(batch))
        wanted = itertools.chain(((number, fetch) for fetch in rest), wanted)
        return _Window(pool, wanted, _FETCHES_PER_THREAD * self._threads)


class _Window(Generic[F]):
    """The fetches that are in flight, or completed and not yet taken.

    By Little's law, a consumer that works for `interval` seconds on each fetch keeps latency / interval of them in
    flight. A window of that length, with a margin, hides the latency, and holds no more memory and threads than that.
    """

    def __init__(self, pool: ThreadPoolExecutor, wanted: Iterator[tuple[int, F]], max_length: int):
        self._pool = pool
        self._wanted = wanted
        self._max_length = max_length
        self._length = max_length  # Until both means are known.
        self._waiting: collections.deque[tuple[int, F, Future[None]]] = collections.deque()
        self._waiting_bytes = 0
        self._latency_s = _Mean()
        self._interval_s = _Mean()
        self._taken_at_s: float | None = None
        self._lock = threading.Lock()

    def next_batch(self) -> int | None:
        """The batch number of the next fetch; None after the last."""
        self._start_more()
        return self._waiting[0][0] if self._waiting else None

    def take(self) -> F:
        """The next fetch, completed."""
        _, fetch, done = self._waiting.popleft()
        if self._taken_at_s is not None:
            self._interval_s.add(time.perf_counter() - self._taken_at_s)
        self._adapt_length()
        self._start_more()
        done.result()
        self._taken_at_s = time.perf_counter()  # The wait for the fetch is not the consumer's work.
        self._add_bytes(-fetch.size)
        return fetch

    def _adapt_length(self) -> None:
        if self._latency_s.count >= _MEAN_OF and self._interval_s.count >= _MEAN_OF:
            needed = _MARGIN * self._latency_s.value / max(self._interval_s.value, 1e-9)
            self._length = int(min(max(needed, _MIN_FETCHES), self._max_length))

    def _start_more(self) -> None:
        while not self._waiting or (len(self._waiting) < self._length and self._waiting_bytes < MAX_WAITING_BYTES):
            batch, fetch = next(self._wanted, (None, None))
            if fetch is None:
                return
            self._add_bytes(fetch.size)
            self._waiting.append((batch, fetch, self._pool.submit(self._run, fetch)))

    def _run(self, fetch: F) -> None:
        expected = fetch.size
        start_s = time.perf_counter()
        fetch.advance()
        self._add_bytes(fetch.size - expected)
        with self._lock:
            self._latency_s.add(time.perf_counter() - start_s)

    def _add_bytes(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes += size


def _waited_s() -> float:
    """Clock that runs while the calling thread waits."""
    return time.perf_counter() - time.thread_time()


class _Mean:
    """Running mean in which the last `_MEAN_OF` values have most of the weight."""

    def __init__(self):
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, _MEAN_OF)
