"""A limit on the size of files, for a block of code.

What it shares with a full disk: a write of many bytes is done in part, and the next one fails. What it does not: the
error is EFBIG ("File too large", setrlimit(2)) and not ENOSPC, and small files and folders can still be made. Disks
that are really full (tmpfs) are in test_disk.py, in processes of their own, since mounting one takes such.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Larger files cannot be written: Python ignores SIGXFSZ, so that it is an error of the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
