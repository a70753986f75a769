"""Exclusive locks on folders, so that no two runs write to one."""

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
from aimv2_jax.storage.leases import Lease

# Errors of flock on file systems without locks: Lustre mounted without -o flock (ENOSYS), NFS whose lock daemon is not
# reachable (ENOLCK), and others.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_folder(file: Path, what: str, folder: Path | str) -> Iterator[None]:
    """Context that holds the lock `file` of `folder`; the system releases it whenever this process ends.

    If the file system has no locks, a lease file (storage/leases.py) is used instead.

    Raises:
      UserError: when another process holds the lock, so `what` (the flag that named the folder) is in use; or when the
        lock is a symbolic link.
    """
    # Existing contents of the file are not changed.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
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
            reason = os.strerror(error.errno)
            print_line(f"the file system of {folder} has no locks ({reason}); using the lease {lease.name}", sys.stderr)
            stack.enter_context(Lease(lease, what, folder))
        yield
