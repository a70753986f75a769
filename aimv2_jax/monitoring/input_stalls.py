"""Diagnosis of input-bound steps: finds the slow stage of the input pipeline and what to change."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

_STARVED = 0.05  # Share of step time spent waiting for data.
_SLOW_TRANSFER = 0.2  # Share of step time spent on transfers, which should overlap with the previous step.
_BUSY = 0.5  # Share of builder time. Below it the builders are fast enough, and batches come in bursts.
_MIN_LOG_INTERVAL_S = 600.0  # Two messages about a stage are at least this far apart.
# Stages of a trainer thread; all others run in the builders.
_TOKENISE, _TRANSFER = "tokenise", "transfer"


class InputMonitor:
    """Monitors the input pipeline: call `add` once a step, `transferring` around transfers, `lap` once an interval.

    Args:
      workers: config data.workers.
      read_threads: config data.read_threads.
      prefetch: config data.prefetch.
      builders: number of batches built at a time: the workers, or the trainer's own threads.
      cores: CPU cores of this host.
      clock: monotonic seconds.
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
        self._workers = workers
        self._read_threads = read_threads
        self._prefetch = prefetch
        self._builders = builders
        self._cores = cores
        self._clock = clock
        self._intervals = 0
        self._logged_at_s: dict[str, float] = {}  # Time of the last message by stage.
        self._begin()

    def _begin(self) -> None:
        self._steps = self._depths = 0
        self._seconds: collections.Counter[str] = collections.Counter()

    def add(self, seconds: Mapping[str, float], depth: int) -> None:
        """Records a step's batch: its `seconds` by stage, and `depth`, the number of finished batches in the queue."""
        self._steps += 1
        self._depths += depth
        for stage, stage_s in seconds.items():
            self._seconds[stage] += stage_s

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """Counts the time inside as transfer of a batch to the devices."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[_TRANSFER] += self._clock() - start

    def lap(
        self, step_time_s: float | None, data_wait_fraction: float | None
    ) -> tuple[dict[str, float | None], str | None]:
        """Returns metrics since the last lap, and advice if steps starved; none after the first lap, nor too often.

        Args:
          step_time_s: mean time of a step.
          data_wait_fraction: share of it spent waiting for a batch.
        """
        depth = self._depths / self._steps if self._steps else None
        seconds, interval_s = self._seconds, self._steps * (step_time_s or 0.0)
        self._begin()
        self._intervals += 1
        values = {"data_queue_depth": depth}
        if self._intervals == 1 or not interval_s:
            return values, None
        if (data_wait_fraction or 0.0) >= _STARVED:
            stage, advice = self._diagnose(seconds, interval_s)
            advice = f"steps wait for data {data_wait_fraction:.0%} of their time; {advice}"
        elif seconds[_TRANSFER] >= _SLOW_TRANSFER * interval_s:
            stage, share = _TRANSFER, seconds[_TRANSFER] / interval_s
            advice = (
                f"steps wait {share:.0%} of their time for the transfer of batches to the devices: "
                "use more hosts, with fewer images each"
            )
        else:
            return values, None
        now_s = self._clock()
        if now_s - self._logged_at_s.get(stage, -_MIN_LOG_INTERVAL_S) < _MIN_LOG_INTERVAL_S:
            return values, None
        self._logged_at_s[stage] = now_s
        return values, advice

    def _diagnose(self, seconds: Mapping[str, float], interval_s: float) -> tuple[str, str]:
        """The slow stage, and the advice about it."""
        building = {stage: stage_s for stage, stage_s in seconds.items() if stage not in (_TOKENISE, _TRANSFER)}
        total = sum(building.values())
        tokenising = seconds.get(_TOKENISE, 0.0) / interval_s
        busy = total / (self._builders * interval_s)  # Includes reading.
        if tokenising > max(busy, _BUSY):
            return _TOKENISE, (
                f"slowest is tokenise, whose single thread is busy {tokenising:.0%} of the time: "
                "use more hosts, with fewer images each, or hosts with faster cores"
            )
        if busy < _BUSY or not total:
            return "", (
                f"batch builders are busy only {busy:.0%} of the time, so batches come in bursts: "
                f"raise data.prefetch from {self._prefetch}"
            )
        stage = max(building, key=building.__getitem__)
        diagnosis = f"slowest is {stage}, {building[stage] / total:.0%} of the time to build a batch: "
        return stage, diagnosis + (self._more_reads() if stage == "read" else self._more_cores())

    def _more_reads(self) -> str:
        return f"raise data.read_threads from {self._read_threads}" + (
            f", or data.workers from {self._workers}" if self._workers < self._cores else ""
        )

    def _more_cores(self) -> str:
        if self._workers < self._cores:
            return f"raise data.workers from {self._workers} (this host has {self._cores} cores)"
        return (
            f"all {self._cores} cores of this host have a worker; use more hosts, or prepare the data with "
            "smaller images (--max-side)"
        )
