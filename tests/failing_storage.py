"""Storage that fails, by the system's own refusals: what array_record says of them is what it says in a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def fail_reads(folder: Path | str) -> int:
    """Lets every file of `folder` that this process has open give EIO from now on; how many. Opening it again helps.

    Their descriptors become those of /proc/self/mem, which the kernel refuses to read where no memory is mapped, as it
    is at the offsets of a shard: pread(2) fails with the EIO of a broken disk or a mounted bucket (proc(5)).
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
    """Meanwhile the file or folder is not there, as what lies below a mount that went away (ENOENT)."""
    elsewhere = path.with_name(f"{path.name}-away")
    path.rename(elsewhere)
    try:
        yield
    finally:
        elsewhere.rename(path)
