"""Anonymous files that processes share: memory without a name, which vanishes with its last user."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import tempfile
from typing import IO


def anonymous_file() -> IO[bytes]:
    """A file without a name, in memory on Linux. No limit of /dev/shm applies to it."""
    return open(os.memfd_create("aimv2_jax"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def map_file(file: IO[bytes]) -> memoryview:
    """The file's content as writable memory, which all processes with the file share; outlives the open file."""
    return memoryview(mmap.mmap(file.fileno(), 0))


def send_file(channel: socket.socket, file: IO[bytes]) -> None:
    """Gives an open file to the process at the other end. A message is one byte, so none can be half sent."""
    file.flush()
    socket.send_fds(channel, [b"f"], [file.fileno()])


def receive_file(channel: socket.socket) -> memoryview | None:
    """The content of the next file from the process at the other end; None if that process has ended."""
    try:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    except ConnectionError:
        return None
    if not message:
        return None
    if not descriptors:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with open(descriptors[0], "r+b") as file:
        return map_file(file)
