"""When steps wait for data: which stage of feeding them is slow, and what to change."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

_STARVED = 0.05  # Share of their time that steps wait for data.
_HANDING = 0.2  # Share of their time that batches take to be handed over, which should go on beside the step before.
_BUSY = 0.5  # Of builders' time: below it they are fast enough, and batches come in bursts.
_SILENCE_S = 600.0  # Between two remarks about the same stage.
# Stages that a thread of the trainer does; all others are the builders'.
_TOKENISE, _TRANSFER = "tokenise", "transfer"


class FeedWatch:
    """Watches how batches come: once a step `add`, and `transferring` around the hand-over; once an interval `lap`.

    Args:
      workers: config data.workers.
      read_threads: config data.read_threads.
      prefetch: config data.prefetch.
      builders: batches that are built at a time: the workers, or the trainer's own threads.
      cores: of this host.
      clock: seconds from any start.
    """

    def __init__(
        self,
        workers: int,
        read_threads: int,
        prefetch: int,
        builders: int,
        cores: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._workers, self._read_threads, self._prefetch = workers, read_threads, prefetch
        self._builders, self._cores, self._clock = builders, cores, clock
        self._intervals = 0
        self._said: dict[str, float] = {}  # When a stage was last named.
        self._begin()

    def _begin(self) -> None:
        self._steps = self._depths = 0
        self._seconds: collections.Counter[str] = collections.Counter()

    def add(self, seconds: Mapping[str, float], depth: int) -> None:
        """A step took a batch whose stages took `seconds`; `depth` finished batches were waiting then."""
        self._steps += 1
        self._depths += depth
        for stage, spent in seconds.items():
            self._seconds[stage] += spent

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """Counts the time inside as handing a batch to the devices."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[_TRANSFER] += self._clock() - start

    def lap(
        self, step_time_s: float | None, data_wait_fraction: float | None
    ) -> tuple[dict[str, float | None], str | None]:
        """Metrics since the last lap, and what to say where steps starved: not about the first lap, nor often.

        Args:
          step_time_s: mean time of a step.
          data_wait_fraction: share of it that was waiting for a batch.
        """
        depth = self._depths / self._steps if self._steps else None
        seconds, interval_s = self._seconds, self._steps * (step_time_s or 0.0)
        self._begin()
        self._intervals += 1
        values = {"data_queue_depth": depth}
        if self._intervals == 1 or not interval_s:
            return values, None
        if (data_wait_fraction or 0.0) >= _STARVED:
            stage, words = self._diagnose(seconds, interval_s)
            words = f"steps wait for data {data_wait_fraction:.0%} of their time; {words}"
        elif seconds[_TRANSFER] >= _HANDING * interval_s:
            stage, share = _TRANSFER, seconds[_TRANSFER] / interval_s
            words = (
                f"steps wait {share:.0%} of their time for the transfer of batches to the devices: "
                "use fewer images a host (more hosts)"
            )
        else:
            return values, None
        now = self._clock()
        if now - self._said.get(stage, -_SILENCE_S) < _SILENCE_S:
            return values, None
        self._said[stage] = now
        return values, words

    def _diagnose(self, seconds: Mapping[str, float], interval_s: float) -> tuple[str, str]:
        """The stage that is to blame, and the words about it."""
        building = {stage: spent for stage, spent in seconds.items() if stage not in (_TOKENISE, _TRANSFER)}
        total = sum(building.values())
        tokenising = seconds.get(_TOKENISE, 0.0) / interval_s
        busy = total / (self._builders * interval_s)  # Reading included.
        if tokenising > max(busy, _BUSY):
            return _TOKENISE, (
                f"slowest is tokenise, which keeps the trainer's one thread for it busy {tokenising:.0%} of the time: "
                "use fewer images a host (more hosts), or a host with faster cores"
            )
        if busy < _BUSY or not total:
            return "", (
                f"yet what builds batches is busy only {busy:.0%} of the time: batches come in bursts; "
                f"raise data.prefetch from {self._prefetch}"
            )
        stage = max(building, key=building.__getitem__)
        blame = f"slowest is {stage}, {building[stage] / total:.0%} of the time that a batch takes to build: "
        return stage, blame + (self._more_reads() if stage == "read" else self._more_cores())

    def _more_reads(self) -> str:
        return f"raise data.read_threads from {self._read_threads}" + (
            f", or data.workers from {self._workers}" if self._workers < self._cores else ""
        )

    def _more_cores(self) -> str:
        if self._workers < self._cores:
            return f"raise data.workers from {self._workers} (this host has {self._cores} cores)"
        return (
            f"all {self._cores} cores of this host have a worker; prepare the data with smaller pictures "
            "(--max-side), or use more hosts"
        )
