"""Reads ahead: a pool of threads fetches what the coming examples need while earlier ones are decoded.

Where every read takes 50 ms (a mounted bucket, a parallel file system), 32 reads at a time are 640 records a second.
Where reads are quick (a local disk), handing them to threads costs more than it saves: then there are none.
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
"""Fetched or under way for one who builds batches, and not yet taken: beyond this nothing more is fetched."""

QUICK_S = 0.0005
"""A read that takes no longer is mostly work (copies, checksum), which no thread hides; handing over takes 0.1 ms."""

_PATIENCE_S = 0.02  # Beyond what is quick, all in all, before the threads start for good.
_MOST_LATE_S = _PATIENCE_S / 4  # That one read counts for: a machine that halts once is no slow disk.
_WAITING_PER_THREAD = 2  # Records on their way or ready, so that a thread finds work while a picture is decoded.


class Fetch(Protocol):
    """Something that is fetched for one example."""

    def advance(self) -> None:
        """Fetches it, in a thread of the pool."""

    @property
    def size(self) -> int:
        """Bytes that it holds after `advance`; before that, those to be expected."""


F = TypeVar("F", bound=Fetch)


class ReadAhead:
    """Runs the fetches of batch after batch, ahead of who takes them and in the order in which they are taken.

    Safe to use from several threads, each building a batch of its own; pickles without its threads.

    Args:
      threads: fetches at a time; 0: each is made when it is taken, by who takes it.
      stride: after batch n comes batch n + stride, whose fetches start while those of n are still being taken; None:
        nobody knows what comes, and no fetch is started before its batch is asked for.
      quick_s: while fetches take no longer than this, they are made by who takes them, too.
    """

    def __init__(self, threads: int = 0, stride: int | None = None, quick_s: float = 0.0):
        self._threads, self._stride, self._quick_s = threads, stride, quick_s
        self._patience_s = _PATIENCE_S if quick_s else 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._window: _Window | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadAhead, (self._threads, self._stride, self._quick_s)

    def __call__(self, number: int, fetches: Callable[[int], Iterable[F]]) -> Iterator[F]:
        """The fetches of batch `number`, each done; an error of one is raised in its turn.

        Args:
          number: the batch.
          fetches: number -> what that batch needs, in order; the same at every call.
        """
        rest, begun = iter(fetches(number)), False
        while not self._threads or self._patience_s > 0:
            fetch = next(rest, None)
            if fetch is None:
                return
            start = time.perf_counter()
            fetch.advance()
            late_s = min(time.perf_counter() - start - self._quick_s, _MOST_LATE_S)
            self._patience_s = min(self._patience_s - late_s, _PATIENCE_S)
            begun = True
            yield fetch
        window = self._window_at(number, rest, fetches, begun)
        while window.next_batch() == number:
            yield window.take()
        if self._stride is not None:
            self._window = window

    def _window_at(
        self, number: int, rest: Iterator[F], fetches: Callable[[int], Iterable[F]], begun: bool
    ) -> _Window[F]:
        """The window on what is left of batch `number`: the one that was left at its head, or a new one."""
        with self._lock:
            window, self._window = self._window, None
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="reads")
            pool = self._pool
        if window is not None and not begun and window.next_batch() == number:
            return window
        later = itertools.count(number + self._stride, self._stride) if self._stride else ()
        wanted = ((batch, fetch) for batch in later for fetch in fetches(batch))
        wanted = itertools.chain(((number, fetch) for fetch in rest), wanted)
        return _Window(pool, wanted, _WAITING_PER_THREAD * self._threads)


class _Window(Generic[F]):
    """The fetches that are under way or done and not yet taken."""

    def __init__(self, pool: ThreadPoolExecutor, wanted: Iterator[tuple[int, F]], length: int):
        self._pool, self._wanted, self._length = pool, wanted, length
        self._waiting: collections.deque[tuple[int, F, Future[None]]] = collections.deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()

    def next_batch(self) -> int | None:
        """The number of the batch whose fetch comes next; None after the last."""
        self._start_more()
        return self._waiting[0][0] if self._waiting else None

    def take(self) -> F:
        """The next fetch, done."""
        _, fetch, done = self._waiting.popleft()
        self._start_more()
        done.result()
        self._add_bytes(-fetch.size)
        return fetch

    def _start_more(self) -> None:
        while not self._waiting or (len(self._waiting) < self._length and self._waiting_bytes < MAX_WAITING_BYTES):
            batch, fetch = next(self._wanted, (None, None))
            if fetch is None:
                return
            self._add_bytes(fetch.size)
            self._waiting.append((batch, fetch, self._pool.submit(self._run, fetch)))

    def _run(self, fetch: F) -> None:
        expected = fetch.size
        fetch.advance()
        self._add_bytes(fetch.size - expected)

    def _add_bytes(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes += size
