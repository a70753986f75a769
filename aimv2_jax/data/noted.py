"""Sources and reads that note which record they are at (whereabouts.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from aimv2_jax.data import whereabouts
from aimv2_jax.data.readahead import ReadAhead
from aimv2_jax.data.sources import Source
from aimv2_jax.data.whereabouts import Doing


class NotedSource:
    """A source, as far as batches need one, that notes what is read from it."""

    def __init__(self, source: Source):
        self._source, self.name, self.mean_bytes = source, source.name, source.mean_bytes
        self._ends = np.cumsum([shard.records for shard in source.info.shards])

    def read(self, index: int) -> bytes:
        """As the source does."""
        notes, record = whereabouts.mine(), self.describe(index)
        notes.write(Doing.READS, record)
        try:
            return self._source.read(index)
        finally:
            notes.write(Doing.HAS_READ, record)

    def describe(self, index: int) -> str:
        """What a record is called: its number, the source, and the file that it is in."""
        shards = self._source.info.shards
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"record {index} of {self.name} ({shards[shard].file})"


@dataclasses.dataclass(frozen=True)
class NotedReads:
    """Reads of whole batches, each noted while it is built: from when it is taken until the next one is asked for."""

    reads: ReadAhead

    def __call__(self, number: int, fetches: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
        record = ""
        for fetch in self.reads(number, fetches):
            record = fetch.source.describe(fetch.index)
            whereabouts.mine().write(Doing.BUILDS, record, number)
            yield fetch
            # What the next one takes to be read is that one's.
            whereabouts.mine().write(Doing.HAS_READ, record, number)
        whereabouts.mine().write(Doing.HAS_BUILT, record, number)
