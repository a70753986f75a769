"""Retries of reads from storage that fails temporarily (a mounted bucket, a network disk).

A record that storage fails to return is not a bad record: after a restart the read may succeed, and a run that had
skipped the record would then train on a different example.
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
"""Default retry time for failing storage, if the config disables the watchdog (`patience_s`)."""

# Retries last a quarter of watch.data_s. After half of it a worker is restarted as stalled; after all of it the run
# ends.
_WATCH_DIVISOR = 4
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 5.0
_ERRNO_BY_TEXT = {os.strerror(number): number for number in errno.errorcode}
_SYSTEM_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")

_Result = TypeVar("_Result")


def patience_s(data_s: float) -> float:
    """Retry time for failing storage in a run with `watch.data_s=data_s`."""
    return data_s / _WATCH_DIVISOR or PATIENCE_S


def system_errno(error: BaseException) -> int | None:
    """The errno of a failed system call; None if `error` has another cause, such as a checksum.

    array_record raises a RuntimeError with the message of the Riegeli library, which begins with the system call and
    the text of strerror(3): "pread() failed: Input/output error; reading FILE; at byte 841458; ...". Observed with
    array_record 0.8.6 for files that are missing, forbidden, folders or loops of links, and for errors injected by
    `strace -e inject=pread64:error=EIO` (EIO, ESTALE, ENOTCONN, ETIMEDOUT, EAGAIN, ENOMEM, EBUSY; likewise openat).
    """
    if isinstance(error, OSError):
        return error.errno
    match = _SYSTEM_CALL.match(str(error)) if isinstance(error, RuntimeError) else None
    return _ERRNO_BY_TEXT.get(match[1].strip(), errno.EIO) if match else None


def retry(call: Callable[[], _Result], path: Path, patience_s: float) -> _Result:
    """Calls `call`, which reads the file `path`, with growing pauses until no system call fails.

    The retry time is shared by all threads of the process that read from the same folder: after `patience_s` without a
    success, every further call fails after one attempt.

    Raises:
      StorageError: when it has failed for `patience_s`.
      UserError: when retries cannot help: the process has too many files open, or may not read the file.
    """
    pause_s, began_s = _MIN_PAUSE_S, None
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
            left_s = patience_s - _OUTAGES.duration_s(path, began_s, os.strerror(number), patience_s)
            if left_s <= 0:
                raise _final_error(path, number, patience_s) from error
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        else:
            _OUTAGES.end(path)
            return result


def _final_error(path: Path, number: int, patience_s: float) -> Exception:
    reason = os.strerror(number)
    if number in (errno.EACCES, errno.EPERM):
        return UserError(
            f"a shard of the data cannot be read ({reason})", str(path), "Give yourself permission to read it"
        )
    return StorageError(f"the data cannot be read since {patience_s:.0f} s: {reason}: {path}")


class _Outages:
    """Folders from which reads fail, with the time of the first failure."""

    def __init__(self):
        self._lock = threading.Lock()
        self._since_s: dict[Path, float] = {}

    def duration_s(self, path: Path, began_s: float, reason: str, patience_s: float) -> float:
        """How long reads from the folder of `path` have been failing; logs the first failure."""
        with self._lock:
            new = path.parent not in self._since_s
            since_s = self._since_s.setdefault(path.parent, began_s)
        if new and patience_s > 0:
            _log(f"cannot read {path} ({reason}); retrying for up to {patience_s:.0f} s")
        return time.monotonic() - min(since_s, began_s)

    def end(self, path: Path) -> None:
        """Ends the outage of the folder of `path` after a successful read."""
        if self._since_s:
            with self._lock:
                since_s = self._since_s.pop(path.parent, None)
            if since_s is not None:
                _log(f"{path.parent} can be read again, after {time.monotonic() - since_s:.1f} s")


_OUTAGES = _Outages()


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
