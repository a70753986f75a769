"""Sources with the read latency of a mounted bucket, and a journal of their reads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from aimv2_jax.data.sources import Source


class SlowSource(Source):
    """Sleeps before every read, and appends to `journal`: process, source, record, concurrent reads."""

    def __init__(self, name: str, path: str, delay_s: float, journal: Path, **options: float):
        super().__init__(name, path, **options)
        self._delay_s = delay_s
        self._journal = journal

    def read(self, index: int) -> bytes:
        with _concurrent_reads as concurrent:
            time.sleep(self._delay_s)
            line = f"{os.getpid()} {self.name} {index} {concurrent}\n"
        with self._journal.open("ab", buffering=0) as file:  # A single appending write keeps lines whole.
            file.write(line.encode())
        return super().read(index)


def journal_lines(journal: Path) -> list[tuple[int, str, int, int]]:
    """The entries of the journal, in the order of the reads."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(int(pid), name, int(index), int(count)) for pid, name, index, count in map(str.split, lines)]


class _Counter:
    def __init__(self):
        self._lock, self._value = threading.Lock(), 0

    def __enter__(self) -> int:
        with self._lock:
            self._value += 1
            return self._value

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._value -= 1


_concurrent_reads = _Counter()
