"""Storage that fails for a while (a mounted bucket, a network disk): its errors recognised, and calls made again.

A record that storage did not give this time is not a bad record: it will give it after a restart, and the run would
then train on another example than before.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aimv2_jax.errors import StorageError, UserError

PATIENCE_S = 150.0
"""Time for which failing storage is tried again, unless the config gives it (`patience_s`)."""

_SHARE_OF_WATCH = 4  # A quarter of watch.data_s: half of it restarts a worker as stalled, all of it ends the run.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 5.0
_ERRNOS = {os.strerror(number): number for number in errno.errorcode}
_SYSTEM_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")

_Result = TypeVar("_Result")


def patience_s(data_s: float) -> float:
    """Time for which storage is tried again in a run with `watch.data_s=data_s`."""
    return data_s / _SHARE_OF_WATCH or PATIENCE_S


def system_errno(error: BaseException) -> int | None:
    """The errno of a system call that failed; None if `error` is about something else, such as a checksum.

    array_record raises a RuntimeError with the message of the Riegeli library, which begins with the system call and
    the text of strerror(3): "pread() failed: Input/output error; reading FILE; at byte 841458; ...". So it was seen
    with array_record 0.8.6 for files that are missing, forbidden, folders or loops of links, and for errors injected
    by `strace -e inject=pread64:error=EIO` (EIO, ESTALE, ENOTCONN, ETIMEDOUT, EAGAIN, ENOMEM, EBUSY; likewise openat).
    """
    if isinstance(error, OSError):
        return error.errno
    found = _SYSTEM_CALL.match(str(error)) if isinstance(error, RuntimeError) else None
    return _ERRNOS.get(found[1].strip(), errno.EIO) if found else None


def retry(call: Callable[[], _Result], path: Path, patience_s: float) -> _Result:
    """Calls `call`, which reads the file `path`, until no system call fails, with growing pauses.

    The time is that of all threads of the process which read from the same folder: once it has been failing for
    `patience_s` without a success in between, every further call fails after one try.

    Raises:
      StorageError: when it has failed for `patience_s`.
      UserError: where waiting is no cure: the process has too many files open, or may not read the file.
    """
    pause_s, began_s = _FIRST_PAUSE_S, None
    while True:
        try:
            result = call()
        except Exception as error:
            number = system_errno(error)
            if number is None:
                raise
            if number in (errno.EMFILE, errno.ENFILE):
                remedy = "Raise the limit on open files (ulimit -n), or lower data.workers"
                raise UserError("too many files are open to read another shard", str(path), remedy) from error
            began_s = began_s or time.monotonic()
            left_s = patience_s - _OUTAGES.lasts_s(path, began_s, os.strerror(number), patience_s)
            if left_s <= 0:
                raise _refusal(path, number, patience_s) from error
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        else:
            _OUTAGES.end(path)
            return result


def _refusal(path: Path, number: int, patience_s: float) -> Exception:
    reason = os.strerror(number)
    if number in (errno.EACCES, errno.EPERM):
        return UserError(f"a shard of the data cannot be read ({reason})", str(path), "Give yourself the right to it")
    return StorageError(f"the data cannot be read since {patience_s:.0f} s: {reason}: {path}")


class _Outages:
    """Folders from which nothing can be read, and since when."""

    def __init__(self):
        self._lock = threading.Lock()
        self._since_s: dict[Path, float] = {}

    def lasts_s(self, path: Path, began_s: float, reason: str, patience_s: float) -> float:
        """Time since which the folder of `path` fails; the first failure is logged."""
        with self._lock:
            new = path.parent not in self._since_s
            since_s = self._since_s.setdefault(path.parent, began_s)
        if new and patience_s > 0:
            _log(f"cannot read {path} ({reason}); it is tried again for up to {patience_s:.0f} s")
        return time.monotonic() - min(since_s, began_s)

    def end(self, path: Path) -> None:
        """A file of the folder was read."""
        if self._since_s:
            with self._lock:
                since_s = self._since_s.pop(path.parent, None)
            if since_s is not None:
                _log(f"{path.parent} can be read again, after {time.monotonic() - since_s:.1f} s")


_OUTAGES = _Outages()


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
