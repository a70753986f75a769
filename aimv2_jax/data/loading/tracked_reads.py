"""Sources and reads that record their progress in the worker status (worker_status.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aimv2_jax.data.loading import worker_status
from aimv2_jax.data.loading.read_ahead import ReadAhead
from aimv2_jax.data.loading.worker_status import Activity
from aimv2_jax.data.sources import Source


class TrackedSource:
    """The part of a source's interface that batches need; updates the worker status around each read."""

    def __init__(self, source: Source):
        self.name = source.name
        self.mean_bytes = source.mean_bytes
        self._source = source
        self._ends = np.cumsum([shard.records for shard in source.info.shards])

    def read(self, index: int) -> bytes:
        """Reads record `index`, see `Source.read`."""
        status = worker_status.this_process()
        record = self.describe(index)
        status.update(Activity.READS, record)
        try:
            return self._source.read(index)
        finally:
            status.update(Activity.HAS_READ, record)

    def describe(self, index: int) -> str:
        """The record's number, source and file, for messages."""
        shards = self._source.info.shards
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"record {index} of {self.name} ({shards[shard].file})"


@dataclasses.dataclass(frozen=True)
class TrackedReads:
    """Wraps `ReadAhead`; reports the record being built, from when it is taken until the next one is requested."""

    reads: ReadAhead

    def __call__(self, number: int, fetches: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
        record = ""
        for fetch in self.reads(number, fetches):
            record = fetch.source.describe(fetch.index)
            worker_status.this_process().update(Activity.BUILDS, record, number)
            yield fetch
            # The time until the next record is read does not count as building this one.
            worker_status.this_process().update(Activity.HAS_READ, record, number)
        worker_status.this_process().update(Activity.HAS_BUILT, record, number)
