"""Locks that keep a second run out of a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from aimv2_jax.errors import UserError


@contextlib.contextmanager
def claimed(file: Path, what: str, folder: Path | str) -> Iterator[None]:
    """Holds the lock `file` of `folder`; the system lets go of it when this process ends, however.

    Raises:
      UserError: that `what` (the flag that named the folder) is in use, if another process holds the lock.
    """
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait until it has ended, or give another folder"
            raise UserError(f"{what} is in use by another run", str(folder), remedy) from error
        yield
