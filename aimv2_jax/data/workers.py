"""Worker processes: how many fit, and what each does before its first batch, so that it never outlives the trainer or
touches its devices."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.shared_memory
import os
import signal
import sys
import threading
import warnings


def cores() -> int:
    """Of this machine, for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_reader(index: int, count: int) -> None:
    """Grain's `worker_init_fn`: a worker that SIGTERM, which some send to all processes, does not end either.

    That is the trainer's to handle: it needs batches until it has come to the step that it saves.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start_worker(index, count)


def start_worker(index: int, count: int) -> None:
    """What a worker of anybody's begins with.

    It ends when its starter does, by kill -9 too; the resource tracker then unlinks the shared memory, since
    nobody holds its pipe any more. Ctrl-C is not its to handle. No backend of jax may start here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _announce_segments()
    _keep_memory()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax := sys.modules.get("jax"):  # grain brings it
        jax.config.update("jax_platforms", "cpu")
    # Pillow's, of broken EXIF blocks and the like: such pictures are used or counted, one by one.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="end-with-trainer", daemon=True).start()


def _announce_segments() -> None:
    """Tells the resource tracker of a segment of shared memory before it is made.

    Python does so right after: a segment whose maker is killed in between would stay for good.
    """
    make_name = multiprocessing.shared_memory._make_filename

    def announced() -> str:
        name = make_name()
        multiprocessing.resource_tracker.register(name, "shared_memory")
        return name

    multiprocessing.shared_memory._make_filename = announced


def _keep_memory() -> None:
    """Keeps glibc from giving memory back whenever a decoded picture of megabytes is done with.

    Getting it again, page by page, takes 5 % of the time of a picture of 1600 pixels.
    """
    trim_threshold, mmap_threshold = -1, -3  # Of mallopt(3); the latter takes up to 32 MiB.
    with contextlib.suppress(OSError, AttributeError):  # Other systems' libraries have other ways.
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 128 << 20)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
