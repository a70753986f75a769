"""Per-thread worker status in shared memory, readable by the trainer after a worker crash.

An update costs microseconds, a record milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import mmap
import multiprocessing.resource_tracker
import multiprocessing.shared_memory
import os
import secrets
import struct
import threading
import time
import weakref
from multiprocessing.shared_memory import SharedMemory

_HEADER = struct.Struct("<Qd")  # Process id and start time; 0 before the process has started.
_ENTRY = struct.Struct("<Bdq183p")  # Activity, start time, step, record.
_MAX_THREADS = 64  # Entries per process: the reading threads and the one that builds.
_STATUS_BYTES = _HEADER.size + _MAX_THREADS * _ENTRY.size
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
    """The entries of one process's threads, in `memory` of `_STATUS_BYTES`, which may be shared with a reader."""

    def __init__(self, memory: memoryview):
        self._memory = memory
        self._lock = threading.Lock()
        self._local = threading.local()

    def begin(self) -> None:
        """Registers this process as the writer."""
        _HEADER.pack_into(self._memory, 0, os.getpid(), time.monotonic())

    @property
    def pid(self) -> int:
        """Process id of the writer; 0 before it has started."""
        return _HEADER.unpack_from(self._memory)[0]

    @property
    def last_update_s(self) -> float:
        """Time of the last update, or of the process's start; 0 before it has started."""
        return max([_HEADER.unpack_from(self._memory)[1], *(entry.since_s for entry in self.read())])

    def update(self, activity: Activity, record: str, step: int = -1) -> None:
        """Replaces the calling thread's entry."""
        offset = getattr(self._local, "offset", 0) or self._allocate_entry()
        _ENTRY.pack_into(self._memory, offset, activity, time.monotonic(), step, record.encode()[:182])

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
        return range(_HEADER.size, _STATUS_BYTES, _ENTRY.size)

    def _read_entry(self, offset: int) -> tuple[int, float, int, bytes]:
        """Reads an entry until two reads agree, so that it is not half written."""
        entry = _ENTRY.unpack_from(self._memory, offset)
        for _ in range(3):
            before, entry = entry, _ENTRY.unpack_from(self._memory, offset)
            if before == entry:
                break
        return entry

    def _allocate_entry(self) -> int:
        """Assigns the calling thread the entry with the oldest update."""
        with self._lock:
            self._local.offset = min(self._offsets(), key=lambda offset: _ENTRY.unpack_from(self._memory, offset)[1])
            _ENTRY.pack_into(self._memory, self._local.offset, Activity.NOTHING, time.monotonic(), -1, b"")
        return self._local.offset


_status = WorkerStatus(memoryview(bytearray(_STATUS_BYTES)))


def this_process() -> WorkerStatus:
    """The status of this process."""
    return _status


def attach(board: str, index: int) -> None:
    """Writes this process's status to entry `index` of the trainer's status board from now on."""
    global _status
    shared = SharedMemory(board)
    _status = WorkerStatus(_map_memory(shared)[index * _STATUS_BYTES : (index + 1) * _STATUS_BYTES])
    shared.close()
    _status.begin()


class StatusBoard:
    """The status of `count` workers, in shared memory called `name`; it is freed even when the trainer is killed."""

    def __init__(self, count: int):
        self._shared = _create_tracked(count * _STATUS_BYTES)
        self.name = self._shared.name
        memory = _map_memory(self._shared)
        self.workers = [
            WorkerStatus(memory[index * _STATUS_BYTES : (index + 1) * _STATUS_BYTES]) for index in range(count)
        ]
        _boards.add(self)

    def close(self) -> None:
        """Unlinks the shared memory. The last entries stay readable here."""
        _boards.discard(self)
        self._shared.close()
        with contextlib.suppress(FileNotFoundError):
            self._shared.unlink()


_boards: weakref.WeakSet[StatusBoard] = weakref.WeakSet()


def open_boards() -> list[StatusBoard]:
    """The status boards of this process that are not closed."""
    return list(_boards)


def _create_tracked(size: int) -> SharedMemory:
    """Creates shared memory that is freed even if this process is killed right after."""
    while True:
        name = f"{multiprocessing.shared_memory._SHM_NAME_PREFIX}{secrets.token_hex(3)}"
        multiprocessing.resource_tracker.register(name, "shared_memory")
        with contextlib.suppress(FileExistsError):
            return SharedMemory(name.lstrip("/"), create=True, size=size)


def _map_memory(shared: SharedMemory) -> memoryview:
    """An independent mapping: it stays valid after `shared` is closed."""
    return memoryview(mmap.mmap(shared._fd, shared.size))
