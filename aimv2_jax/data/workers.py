"""Worker processes: how many fit, and what each does before its first batch, so that it never outlives the trainer or
touches its devices; and what can be done to those of a trainer: look at their stacks, end them, clear up after them."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.shared_memory
import multiprocessing.synchronize
import os
import signal
import sys
import threading
import time
import warnings
from typing import NamedTuple

from aimv2_jax.allocator import keep_freed_pictures
from aimv2_jax.data import whereabouts
from aimv2_jax.errors import UserError

_STACKS_S = 1.0  # In which the stacks of all workers are written.
_ERRORS = 2  # The file of this process, and of its workers, that ends up in the log.
_SEGMENTS = "/dev/shm"  # Where Linux has segments of shared memory.
_SMALL_ARRAYS_BYTES = 1 << 16  # Of a batch, beside its own: captions and faults, and pages that are not full.


def cores() -> int:
    """Of this machine, for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_shared_memory(batch_bytes: int, workers: int, prefetch: int) -> None:
    """Checks that the batches that `workers` of grain hold ready fit into what is free of /dev/shm.

    A worker has `prefetch` of them in its queue and one on its way there; as many wait where the trainer takes them (as
    measured with grain 0.2.18: 2 x prefetch + 2 batches a worker). Without room, a write to a batch ends the worker by
    SIGBUS: memory of tmpfs is reserved only when it is written.

    Raises:
      UserError: with the room that there is, and what is needed.
    """
    room, needed = _shared_memory(), workers * (2 * prefetch + 2) * (batch_bytes + _SMALL_ARRAYS_BYTES)
    if room is not None and needed > room.free:
        raise UserError(
            f"{_SEGMENTS} has no room for the batches of {workers} data workers",
            f"{room}, {needed / 2**20:,.0f} MiB needed",
            _enlarge(f"{math.ceil((room.size - room.free + needed) / 2**20)}m"),
        )


def remedy_for(exit_code: int | None) -> str:
    """What to do about a worker that ended with this code, as far as that is known."""
    if exit_code == -signal.SIGBUS:
        return f"It is SIGBUS, mostly for want of room in {_SEGMENTS} ({_shared_memory()}). {_enlarge()}"
    return "Exit code -9 is mostly the system's want of memory: lower data.workers or data.prefetch"


def no_room_error(error: OSError) -> UserError:
    """The error about a worker that was refused shared memory (ENOSPC); it writes nowhere else."""
    return UserError(f"a data worker found no room in {_SEGMENTS}", f"{error.strerror}, {_shared_memory()}", _enlarge())


def _enlarge(size: str = "...") -> str:
    return (
        f"Enlarge it (docker run --shm-size={size}; in Kubernetes, mount a volume of medium Memory there), or lower "
        "data.workers or data.prefetch"
    )


class _Room(NamedTuple):
    """Bytes of shared memory."""

    size: int
    free: int

    def __str__(self) -> str:
        return f"{self.free / 2**20:,.0f} MiB free of {self.size / 2**20:,.0f} MiB"


def _shared_memory() -> _Room | None:
    """None on systems that keep it elsewhere."""
    if not os.path.isdir(_SEGMENTS):
        return None
    status = os.statvfs(_SEGMENTS)
    return _Room(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


def start_reader(index: int, count: int, desk: str) -> None:
    """Grain's `worker_init_fn`: a worker that SIGTERM, which some send to all processes, does not end either.

    That is the trainer's to handle: it needs batches until it has come to the step that it saves. The worker notes what
    it does at the trainer's `desk`, and its shared memory can be told by that name, too.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_worker(index, count, _family(desk))
    whereabouts.note_at(desk, index)


def start_worker(index: int, count: int, family: str = "") -> None:
    """What a worker of anybody's begins with; names of its shared memory end with `family`.

    It ends when its starter does, by kill -9 too; the resource tracker then unlinks the shared memory, since
    nobody holds its pipe any more. Ctrl-C is not its to handle. SIGUSR1 has it write its stacks to the log. No backend
    of jax may start here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, _ERRORS, all_threads=True)
    _announce_segments(family)
    keep_freed_pictures()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # grain brings it
        jax.config.update("jax_platforms", "cpu")
    # Pillow's, of broken EXIF blocks and the like: such pictures are used or counted, one by one.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    parent = multiprocessing.parent_process()
    assert parent is not None
    _be_killed_with(parent.sentinel)
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="end-with-trainer", daemon=True).start()


def write_stacks(only: int | None = None) -> None:
    """Has the workers of this process that build batches write what all their threads do to the log, one after another.

    `only` is the process id of one of them. A worker that is stopped, or waits for a disk in the kernel, cannot.
    """
    pids = [pid for pid in reading() if only in (None, pid)]
    for pid in pids:
        with contextlib.suppress(OSError):  # It has ended.
            os.write(_ERRORS, f"--- stacks of data worker {pid}:\n".encode())
            os.kill(pid, signal.SIGUSR1)
            time.sleep(min(0.1, _STACKS_S / len(pids)))
    if pids:
        time.sleep(0.2)


def reading() -> list[int]:
    """The process ids of this process' workers that build batches, and live."""
    children = {child.pid for child in multiprocessing.active_children()}
    noted = [notes.pid for desk in whereabouts.desks() for notes in desk.workers]
    return sorted({pid for pid in noted if pid in children})


def clear_up(desk: str) -> None:
    """Frees the shared memory of ended workers that have noted at `desk`, and of which nobody has heard."""
    if not os.path.isdir(_SEGMENTS):
        return  # Other systems don't list them: then they go when this process ends.
    for name in os.listdir(_SEGMENTS):
        if name.endswith(_family(desk)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(_SEGMENTS, name))
                multiprocessing.resource_tracker.unregister(f"/{name}", "shared_memory")


def _family(desk: str) -> str:
    return f".{desk[-6:]}"


def _announce_segments(family: str) -> None:
    """Tells the resource tracker of a segment of shared memory before it is made; its name ends with `family`.

    Python does so right after: a segment whose maker is killed in between would stay for good.
    """
    make_name = multiprocessing.shared_memory._make_filename

    def announced() -> str:
        name = make_name() + family
        multiprocessing.resource_tracker.register(name, "shared_memory")
        return name

    multiprocessing.shared_memory._make_filename = announced


def announce_semaphores() -> None:
    """Tells the resource tracker of a semaphore before it is made, in the process that starts workers.

    Python does so right after: one that was made in between, when the process is killed or ends itself, would stay.
    """
    multiprocessing.synchronize.SemLock._make_name = _announced_semaphore


_semaphore_name = multiprocessing.synchronize.SemLock._make_name


def _announced_semaphore(semaphore: multiprocessing.synchronize.SemLock) -> str:
    name = _semaphore_name()
    if not getattr(semaphore, "_is_fork_ctx", True):  # Those lose their name as soon as they are made.
        multiprocessing.resource_tracker.register(name, "semaphore")
    return name


def _be_killed_with(sentinel: int) -> None:
    """Has the system kill this process when its starter has ended: a thread needs Python's lock, which C may hold."""
    if sys.platform == "linux":  # The others have the thread alone.
        set_signal = 10  # F_SETSIG of fcntl(2).
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, set_signal, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
