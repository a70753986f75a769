"""Per-thread status of a process that builds batches, in memory that the trainer can read after a worker's crash.

An update costs microseconds, a record milliseconds.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import threading
import time

_ENTRY = struct.Struct("<Bdq183p")  # Activity, start time, step, record.
_MAX_THREADS = 64  # Entries per process: the reading threads and the one that builds.
STATUS_BYTES = _MAX_THREADS * _ENTRY.size
_MAX_DESCRIBED = 4  # Entries of a process in a description: the longest active ones.


class Activity(enum.IntEnum):
    NOTHING = 0
    READS = 1
    HAS_READ = 2
    BUILDS = 3
    HAS_BUILT = 4


@dataclasses.dataclass(frozen=True)
class ThreadStatus:
    """A thread's activity and record. `since_s` is from `time.monotonic`, a clock that all processes share."""

    activity: Activity
    since_s: float
    step: int
    record: str

    @property
    def active(self) -> bool:
        return self.activity in (Activity.READS, Activity.BUILDS)

    def __str__(self) -> str:
        text = {
            Activity.READS: f"reads {self.record}",
            Activity.HAS_READ: f"has read {self.record}",
            Activity.BUILDS: f"builds step {self.step} from {self.record}",
            Activity.HAS_BUILT: f"has built step {self.step}",
        }[self.activity]
        seconds = time.monotonic() - self.since_s
        return f"{text}, for {seconds:.1f} s" if self.active else f"{text}, {seconds:.1f} s ago"


class WorkerStatus:
    """The entries of one process's threads, in `memory` of `STATUS_BYTES` zeros that another process may read."""

    def __init__(self, memory: memoryview | None = None):
        self._memory = memoryview(bytearray(STATUS_BYTES)) if memory is None else memory
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def last_update_s(self) -> float:
        """Time of the last update; 0 before the first."""
        return max((entry.since_s for entry in self.read()), default=0.0)

    def update(self, activity: Activity, record: str, step: int = -1) -> None:
        """Replaces the calling thread's entry."""
        if not hasattr(self._local, "offset"):
            self._allocate_entry()
        _ENTRY.pack_into(self._memory, self._local.offset, activity, time.monotonic(), step, record.encode()[:182])

    def read(self) -> list[ThreadStatus]:
        """The entries of all threads: active ones first, the longest active one at the head."""
        entries = []
        for offset in self._offsets():
            activity, since_s, step, record = self._read_entry(offset)
            if activity:
                entries.append(ThreadStatus(Activity(activity), since_s, step, record.decode(errors="replace")))
        return sorted(entries, key=lambda entry: (not entry.active, entry.since_s if entry.active else -entry.since_s))

    def describe(self) -> str:
        """One line about the active threads, or about the last activity where none is active."""
        entries = self.read()
        shown = [entry for entry in entries if entry.active] or entries[:1]
        more = f"; and {len(shown) - _MAX_DESCRIBED} more threads read" if len(shown) > _MAX_DESCRIBED else ""
        return "; ".join(str(entry) for entry in shown[:_MAX_DESCRIBED]) + more or "has read nothing yet"

    @staticmethod
    def _offsets() -> range:
        return range(0, STATUS_BYTES, _ENTRY.size)

    def _read_entry(self, offset: int) -> tuple[int, float, int, bytes]:
        """Reads an entry until two reads agree, so that it is not half written."""
        entry = _ENTRY.unpack_from(self._memory, offset)
        for _ in range(3):
            before, entry = entry, _ENTRY.unpack_from(self._memory, offset)
            if before == entry:
                break
        return entry

    def _allocate_entry(self) -> None:
        """Assigns the calling thread the entry with the oldest update."""
        with self._lock:
            self._local.offset = min(self._offsets(), key=lambda offset: _ENTRY.unpack_from(self._memory, offset)[1])
            _ENTRY.pack_into(self._memory, self._local.offset, Activity.NOTHING, time.monotonic(), -1, b"")
