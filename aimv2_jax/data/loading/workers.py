"""Worker processes: memory check, start-up, stack dumps and clean-up.

A worker never outlives the trainer and never touches its devices.
"""

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

from aimv2_jax.allocator import keep_freed_image_buffers
from aimv2_jax.data.loading import worker_status
from aimv2_jax.errors import UserError

_STACK_DUMP_S = 1.0  # Time over which the stack dumps of all workers are spread.
_STDERR = 2  # File descriptor of the log, in this process and in its workers.
_SHM_DIR = "/dev/shm"  # Linux lists shared memory segments here.
_SMALL_ARRAYS_BYTES = 1 << 16  # Bytes per batch beside its arrays: captions, faults and partly filled pages.


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_shared_memory(batch_bytes: int, workers: int, prefetch: int) -> None:
    """Checks that the prefetched batches of `workers` grain workers fit into the free space of /dev/shm.

    A worker has `prefetch` batches in its queue and one in transit; as many wait on the trainer's side (measured with
    grain 0.2.18: 2 x prefetch + 2 batches per worker). When /dev/shm is full, a write to a batch kills the worker with
    SIGBUS: tmpfs reserves memory only when it is written.

    Raises:
      UserError: if they do not fit; it states the free and the needed space.
    """
    room = _shared_memory()
    needed = workers * (2 * prefetch + 2) * (batch_bytes + _SMALL_ARRAYS_BYTES)
    if room is not None and needed > room.free:
        raise UserError(
            f"{_SHM_DIR} has no room for the batches of {workers} data workers",
            f"{room}, {needed / 2**20:,.0f} MiB needed",
            _enlarge(f"{math.ceil((room.size - room.free + needed) / 2**20)}m"),
        )


def remedy_for(exit_code: int | None) -> str:
    """Remedy for a worker that ended with this exit code."""
    if exit_code == -signal.SIGBUS:
        return f"It is SIGBUS, which usually means that {_SHM_DIR} is full ({_shared_memory()}). {_enlarge()}"
    return "Exit code -9 usually means the OOM killer: lower data.workers or data.prefetch"


def no_room_error(error: OSError) -> UserError:
    """The user error for ENOSPC in a worker, which writes to shared memory only."""
    return UserError(f"a data worker found no room in {_SHM_DIR}", f"{error.strerror}, {_shared_memory()}", _enlarge())


def _enlarge(size: str = "...") -> str:
    return (
        f"Enlarge it (docker run --shm-size={size}; in Kubernetes, mount a volume of medium Memory there), or lower "
        "data.workers or data.prefetch"
    )


class _Room(NamedTuple):
    """Size and free space of shared memory, in bytes."""

    size: int
    free: int

    def __str__(self) -> str:
        return f"{self.free / 2**20:,.0f} MiB free of {self.size / 2**20:,.0f} MiB"


def _shared_memory() -> _Room | None:
    """Space in /dev/shm; None on systems without it."""
    if not os.path.isdir(_SHM_DIR):
        return None
    status = os.statvfs(_SHM_DIR)
    return _Room(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


def start_data_worker(index: int, count: int, board: str) -> None:
    """Grain's `worker_init_fn`: `start_worker`, ignoring SIGTERM and reporting to the trainer's status board.

    Some launchers send SIGTERM to all processes. The trainer handles it and needs batches until the step that it
    saves. The names of the worker's shared memory end with a suffix of `board`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_worker(index, count, _segment_suffix(board))
    worker_status.attach(board, index)


def start_worker(index: int, count: int, suffix: str = "") -> None:
    """Prepares any worker process; the names of its shared memory end with `suffix`.

    The worker ends with its parent, even one killed by kill -9; the resource tracker then unlinks the shared memory,
    because its pipe has no writer left. The worker ignores Ctrl-C and dumps its stacks to the log on SIGUSR1. No JAX
    backend may start here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)
    _track_segments(suffix)
    keep_freed_image_buffers()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # Grain imports jax.
        jax.config.update("jax_platforms", "cpu")
    # Pillow warns about broken EXIF blocks and the like: each such image is used, or counted as unusable.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    parent = multiprocessing.parent_process()
    assert parent is not None
    _kill_with_parent(parent.sentinel)
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), name="end-with-trainer", daemon=True).start()


def write_stacks(only: int | None = None) -> None:
    """Makes the data workers of this process dump the stacks of all their threads to the log, one after another.

    `only` is the process id of one worker. A worker that is stopped, or waits for a disk in the kernel, cannot.
    """
    pids = [pid for pid in live_worker_pids() if only in (None, pid)]
    for pid in pids:
        with contextlib.suppress(OSError):  # The worker has ended.
            os.write(_STDERR, f"--- stacks of data worker {pid}:\n".encode())
            os.kill(pid, signal.SIGUSR1)
            time.sleep(min(0.1, _STACK_DUMP_S / len(pids)))
    if pids:
        time.sleep(0.2)


def live_worker_pids() -> list[int]:
    """Process ids of this process's live data workers."""
    children = {child.pid for child in multiprocessing.active_children()}
    registered = [status.pid for board in worker_status.open_boards() for status in board.workers]
    return sorted({pid for pid in registered if pid in children})


def unlink_shared_memory(board: str) -> None:
    """Unlinks the shared memory that ended workers of status board `board` left behind."""
    if not os.path.isdir(_SHM_DIR):
        return  # Other systems don't list segments; the resource tracker frees them when this process ends.
    for name in os.listdir(_SHM_DIR):
        if name.endswith(_segment_suffix(board)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(_SHM_DIR, name))
                multiprocessing.resource_tracker.unregister(f"/{name}", "shared_memory")


def _segment_suffix(board: str) -> str:
    return f".{board[-6:]}"


def _track_segments(suffix: str) -> None:
    """Registers each shared memory segment with the resource tracker before it is created; names end with `suffix`.

    Python registers it right after: a segment whose creator is killed in between would never be freed.
    """
    make_name = multiprocessing.shared_memory._make_filename

    def make_tracked_name() -> str:
        name = make_name() + suffix
        multiprocessing.resource_tracker.register(name, "shared_memory")
        return name

    multiprocessing.shared_memory._make_filename = make_tracked_name


def track_semaphores() -> None:
    """Registers each semaphore with the resource tracker before it is created, in the process that starts workers.

    Python registers it right after: a semaphore created just before the process ends would never be freed.
    """
    multiprocessing.synchronize.SemLock._make_name = _make_tracked_semaphore_name


_make_semaphore_name = multiprocessing.synchronize.SemLock._make_name


def _make_tracked_semaphore_name(semaphore: multiprocessing.synchronize.SemLock) -> str:
    name = _make_semaphore_name()
    if not getattr(semaphore, "_is_fork_ctx", True):  # A semaphore for fork is unlinked as soon as it is created.
        multiprocessing.resource_tracker.register(name, "semaphore")
    return name


def _kill_with_parent(sentinel: int) -> None:
    """Makes the kernel kill this process when its parent ends: a thread would need the GIL, which C code may hold."""
    if sys.platform == "linux":  # Other systems rely on the thread alone.
        set_signal = 10  # F_SETSIG of fcntl(2).
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, set_signal, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def _exit_with_parent(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
