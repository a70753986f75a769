"""Worker processes from within: start-up, the loop that builds batches, stack dumps.

A worker never outlives the trainer and never touches its devices.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings

from aimv2_jax.allocator import keep_freed_image_buffers
from aimv2_jax.data.loading.shared_files import anonymous_file, receive_file, send_file
from aimv2_jax.data.loading.worker_status import WorkerStatus

REQUEST = struct.Struct("<q")  # The position of a batch.
NAME = "data worker"  # The names of data workers begin with it.
_STACK_DUMP_S = 1.0  # Time over which the stack dumps of all workers are spread.
_STDERR = 2  # File descriptor of the log, in this process and in its workers.


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_worker(channel: socket.socket, max_ahead: int) -> None:
    """Builds the batches that the trainer requests over `channel`, until it closes that.

    The first two messages are the file for the worker's status, and the file with the pickled function that makes the
    dataset of the batches from that status. The others are positions in the dataset. The answer to each is a file with
    the batch, or with the error of building it.

    At most `max_ahead` requests are open at a time: the trainer sends one more when it has copied the first batch out
    of its file. So that many files serve all batches, and the kernel allocates their pages once.

    Grain's own workers are not used: their batches lie in named shared memory, which a full /dev/shm turns into a
    SIGBUS and a kill at the wrong moment leaves behind, and a dead worker is an error without a class.
    """
    # Some launchers send SIGTERM to all processes. The trainer handles it and needs batches until the step that it
    # saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_worker()
    status_memory = receive_file(channel)
    pickled = receive_file(channel)
    if status_memory is None or pickled is None:
        return
    status = WorkerStatus(status_memory)
    open_batches = pickle.loads(pickled)  # Imports the modules of the pipeline, now that the process is set up.
    batches = open_batches(status)
    files = itertools.cycle([anonymous_file() for _ in range(max_ahead)])
    with contextlib.suppress(ConnectionError):  # The trainer has closed the channel.
        while request := channel.recv(REQUEST.size, socket.MSG_WAITALL):
            try:
                [position] = REQUEST.unpack(request)
                result = batches[position]
            except Exception as error:  # Raised by the trainer in place of the batch.
                result = _picklable(error)
            file = next(files)
            file.seek(0)
            pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
            send_file(channel, file)


def _picklable(error: Exception) -> Exception:
    """The exception with its traceback as a note, since a traceback cannot be pickled."""
    text = f"In a data worker:\n{traceback.format_exc()}"
    error.add_note(text)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error


def start_worker() -> None:
    """Prepares any worker process.

    The worker ends with its parent, even one killed by kill -9. It ignores Ctrl-C and dumps its stacks to the log on
    SIGUSR1. No JAX backend may start here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)
    keep_freed_image_buffers()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # The main module of the trainer may import jax.
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
    return sorted(child.pid for child in multiprocessing.active_children() if child.pid and child.name.startswith(NAME))


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
