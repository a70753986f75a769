"""Storage failures by real errors of system calls, so that array_record reports them as in a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def fail_reads(folder: Path | str) -> int:
    """Lets reads of all open files of `folder` fail with EIO until they are reopened; returns the number of files.

    Their descriptors are replaced by /proc/self/mem, which cannot be read where no memory is mapped, as at the offsets
    of a shard: pread(2) fails with EIO, as on a broken disk or a mounted bucket (proc(5)).
    """
    folder, failing = os.path.realpath(folder), 0
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # The descriptor of the listing itself.
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"{folder}{os.sep}"):
                os.dup2(memory, int(name), inheritable=False)
                failing += 1
    os.close(memory)
    return failing


@contextlib.contextmanager
def away(path: Path) -> Iterator[None]:
    """Hides the file or folder (ENOENT), as when its mount is gone."""
    elsewhere = path.with_name(f"{path.name}-away")
    path.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(path)
