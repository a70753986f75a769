"""A limit on the size of files, which simulates a full disk.

As on a full disk, a large write is done in part and the next write fails. Unlike there, the error is EFBIG ("File too
large", setrlimit(2)) instead of ENOSPC, and small files and folders can still be created. test_disk.py uses disks that
are really full (tmpfs), in separate processes, as mounts require.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Lets writes beyond `num_bytes` in a file fail; Python ignores SIGXFSZ, so that they raise OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
