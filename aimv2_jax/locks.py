"""Locks that keep a second run out of a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.leases import Lease

# What flock raises on file systems without locks: Lustre that is not mounted with -o flock (ENOSYS), NFS whose lock
# daemon is not reached (ENOLCK), and others.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def claimed(file: Path, what: str, folder: Path | str) -> Iterator[None]:
    """Holds the lock `file` of `folder`; the system releases it when this process ends, however.

    Where the file system has no locks, a lease beside it (leases.py) takes its place.

    Raises:
      UserError: that `what` (the flag that named the folder) is in use, if another process holds the lock; or that the
        lock is a symbolic link.
    """
    flags = (
        os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    )  # Nothing of what is there is changed.
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"the lock of {what} is a symbolic link", str(file), "Remove the link") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait until it has ended, or give another folder"
            raise UserError(f"{what} is in use by another run", str(folder), remedy) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            lease = file.with_name(f"{file.name}.lease")
            why = os.strerror(error.errno)
            print_line(f"no locks in {folder} ({why}): {lease.name} takes their place", sys.stderr)
            stack.enter_context(Lease(lease, what, folder))
        yield
