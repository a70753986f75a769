"""What every thread that reads or builds is at: its own process knows, and of a worker its trainer, even if it is dead.

A note costs some microseconds, and a record some milliseconds.
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

_HEAD = struct.Struct("<Qd")  # Process id and when it began; 0 before.
_NOTE = struct.Struct("<Bdq183p")  # What it does, since when, step, record.
_THREADS = 64  # That may note in one process: those that read, and one that builds.
_BYTES = _HEAD.size + _THREADS * _NOTE.size
_SHOWN = 4  # Notes of a process: those that are under way, for the longest time first.


class Doing(enum.IntEnum):
    NOTHING = 0
    READS = 1
    HAS_READ = 2
    BUILDS = 3
    HAS_BUILT = 4


@dataclasses.dataclass(frozen=True)
class Note:
    """What a thread does with a record. `since_s` is of the clock `time.monotonic`, which all processes share."""

    doing: Doing
    since_s: float
    step: int
    record: str

    @property
    def under_way(self) -> bool:
        return self.doing in (Doing.READS, Doing.BUILDS)

    def __str__(self) -> str:
        what = {
            Doing.READS: f"reads {self.record}",
            Doing.HAS_READ: f"has read {self.record}",
            Doing.BUILDS: f"builds step {self.step} from {self.record}",
            Doing.HAS_BUILT: f"has built step {self.step}",
        }[self.doing]
        seconds = time.monotonic() - self.since_s
        return f"{what}, for {seconds:.1f} s" if self.under_way else f"{what}, {seconds:.1f} s ago"


class Notes:
    """Those of the threads of one process, in `memory` of `_BYTES`, which may be shared with who reads them."""

    def __init__(self, memory: memoryview):
        self._memory = memory
        self._lock, self._mine = threading.Lock(), threading.local()

    def begin(self) -> None:
        """This process is the one that notes."""
        _HEAD.pack_into(self._memory, 0, os.getpid(), time.monotonic())

    @property
    def pid(self) -> int:
        """Of the process that notes; 0 as long as there is none."""
        return _HEAD.unpack_from(self._memory)[0]

    @property
    def changed_s(self) -> float:
        """When the last note was made, or the process began; 0 as long as there is none."""
        return max([_HEAD.unpack_from(self._memory)[1], *(note.since_s for note in self.read())])

    def write(self, doing: Doing, record: str, step: int = -1) -> None:
        """Replaces what the calling thread had noted."""
        offset = getattr(self._mine, "offset", 0) or self._place()
        _NOTE.pack_into(self._memory, offset, doing, time.monotonic(), step, record.encode()[:182])

    def read(self) -> list[Note]:
        """The notes of all threads: first what is under way, for the longest time."""
        found = []
        for offset in self._offsets():
            doing, since_s, step, record = self._whole(offset)
            if doing:
                found.append(Note(Doing(doing), since_s, step, record.decode(errors="replace")))
        return sorted(found, key=lambda note: (not note.under_way, note.since_s if note.under_way else -note.since_s))

    def told(self) -> str:
        """The notes that say what the process was at."""
        notes = self.read()
        shown = [note for note in notes if note.under_way] or notes[:1]
        more = f"; and {len(shown) - _SHOWN} more threads read" if len(shown) > _SHOWN else ""
        return "; ".join(str(note) for note in shown[:_SHOWN]) + more or "has read nothing yet"

    @staticmethod
    def _offsets() -> range:
        return range(_HEAD.size, _BYTES, _NOTE.size)

    def _whole(self, offset: int) -> tuple[int, float, int, bytes]:
        """A note that was not being written while it was read."""
        found = _NOTE.unpack_from(self._memory, offset)
        for _ in range(3):
            before, found = found, _NOTE.unpack_from(self._memory, offset)
            if before == found:
                break
        return found

    def _place(self) -> int:
        """A place for the calling thread: that of the thread which was silent for the longest time."""
        with self._lock:
            self._mine.offset = min(self._offsets(), key=lambda offset: _NOTE.unpack_from(self._memory, offset)[1])
            _NOTE.pack_into(self._memory, self._mine.offset, Doing.NOTHING, time.monotonic(), -1, b"")
        return self._mine.offset


_notes = Notes(memoryview(bytearray(_BYTES)))


def mine() -> Notes:
    """Those of this process."""
    return _notes


def note_at(desk: str, index: int) -> None:
    """From now on this process notes what it does at place `index` of its trainer's desk."""
    global _notes
    shared = SharedMemory(desk)
    _notes = Notes(_mapped(shared)[index * _BYTES : (index + 1) * _BYTES])
    shared.close()
    _notes.begin()


class Desk:
    """The notes of `count` workers, in memory that they find by `name`; when the trainer is killed, that goes too."""

    def __init__(self, count: int):
        self._shared = _announced(count * _BYTES)
        self.name = self._shared.name
        memory = _mapped(self._shared)
        self.workers = [Notes(memory[index * _BYTES : (index + 1) * _BYTES]) for index in range(count)]
        _desks.add(self)

    def close(self) -> None:
        """No more workers find it. The last notes stay."""
        _desks.discard(self)
        self._shared.close()
        with contextlib.suppress(FileNotFoundError):
            self._shared.unlink()


_desks: weakref.WeakSet[Desk] = weakref.WeakSet()


def desks() -> list[Desk]:
    """Those of this process that are not closed."""
    return list(_desks)


def _announced(size: int) -> SharedMemory:
    """Shared memory that goes even if this process is killed right after it is made."""
    while True:
        name = f"{multiprocessing.shared_memory._SHM_NAME_PREFIX}{secrets.token_hex(3)}"
        multiprocessing.resource_tracker.register(name, "shared_memory")
        with contextlib.suppress(FileExistsError):
            return SharedMemory(name.lstrip("/"), create=True, size=size)


def _mapped(shared: SharedMemory) -> memoryview:
    """Of its own: it stays as long as it is looked at, and `shared` can be closed."""
    return memoryview(mmap.mmap(shared._fd, shared.size))
