"""Sources whose reads take as long as those of a mounted bucket, and that write down what they read."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from aimv2_jax.data.sources import Source


class SlowSource(Source):
    """Sleeps before every read, and adds a line a read to `journal`: process, source, record, reads at a time."""

    def __init__(self, name: str, path: str, delay_s: float, journal: Path, **options: float):
        super().__init__(name, path, **options)
        self._delay_s, self._journal = delay_s, journal

    def read(self, index: int) -> bytes:
        with _count as at_a_time:
            time.sleep(self._delay_s)
            line = f"{os.getpid()} {self.name} {index} {at_a_time}\n"
        with self._journal.open("ab", buffering=0) as file:  # One write to a file opened for appending: whole lines.
            file.write(line.encode())
        return super().read(index)


def journal_lines(journal: Path) -> list[tuple[int, str, int, int]]:
    """What the journal says, in the order of the reads."""
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


_count = _Counter()
