"""Retries of reads from storage that fails temporarily (a bucket, mounted or not, or a network disk).

A record that storage fails to return is not a bad record: after a restart the read may succeed, and a run that had
skipped the record would then train on a different example.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage.bucket import look_up_credentials, scheme_of

PATIENCE_S = 150.0
"""Default retry time for failing storage, if the config disables the watchdog (`patience_s`)."""

# Retries last a quarter of watch.data_s. After half of it a worker is restarted as stalled; after all of it the run
# ends.
_WATCH_DIVISOR = 4
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 5.0
_LOGGED_AFTER_S = 0.5  # A busy bucket fails single requests all the time, which are counted, not logged.
# A bucket that answers "no access" or "no such object" may do so for a moment, while credentials are renewed.
_ANSWERS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENODATA)
_ANSWER_PATIENCE_S = 8.0

_Result = TypeVar("_Result")


def patience_s(data_s: float) -> float:
    """Retry time for failing storage in a run with `watch.data_s=data_s`."""
    return data_s / _WATCH_DIVISOR or PATIENCE_S


class RetryCount:
    """Number of retries of this process; threads may add to it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._value = 0

    def add(self) -> None:
        """Counts one retry."""
        with self._lock:
            self._value += 1

    def take(self) -> int:
        """The number since the last call."""
        with self._lock:
            value, self._value = self._value, 0
        return value


DATA_RETRIES = RetryCount()
"""Retried reads of the data."""

STORAGE_RETRIES = RetryCount()
"""Other retried requests to buckets: those of workdirs, and of inputs and outputs of a preparation."""


def retry(call: Callable[[], _Result], path: str | os.PathLike, patience_s: float) -> _Result:
    """Calls `call`, which reads the file or object `path`, with growing pauses until it raises no `OSError`.

    The retry time is shared by all threads of the process that read from the same folder: after `patience_s` without a
    success, every further call fails after one attempt. While other reads from a bucket succeed, one that it is too
    busy for is retried without end. Each retry is counted in `DATA_RETRIES`.

    Raises:
      StorageError: when it has failed for `patience_s`.
      UserError: when retries cannot help: the process has too many files open, may not read the file, or the file is
        shorter than it was. A bucket's answer of this kind, or that it has no such object, is believed after 8 s.
    """
    pause_s, began_s = _MIN_PAUSE_S, None
    while True:
        try:
            result = call()
        except OSError as error:
            if error.errno is None:
                raise
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "Raise the limit on open files (ulimit -n), or lower data.workers"
                raise UserError("too many files are open to read another shard", str(path), remedy) from error
            if error.errno == errno.EINVAL and scheme_of(path):
                remedy = "Check the bucket's name and region"
                raise UserError(f"the data cannot be read ({_reason(error)})", str(path), remedy) from error
            is_answer = error.errno == errno.ENODATA or (scheme_of(path) and error.errno in _ANSWERS)
            began_s = began_s or time.monotonic()
            outage_s = _OUTAGES.duration_s(path, _reason(error), patience_s)
            own_s = time.monotonic() - began_s
            if is_answer:
                left_s = min(patience_s, _ANSWER_PATIENCE_S) - own_s
            elif scheme_of(path) and error.errno == errno.EAGAIN:  # A bucket that refuses some reads is busy, not away.
                left_s = patience_s - outage_s
            else:
                left_s = patience_s - max(outage_s, own_s)
            if left_s <= 0:
                raise _final_error(path, error, patience_s) from error
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            DATA_RETRIES.add()
            if error.errno == errno.EACCES and scheme_of(path):
                look_up_credentials(path)
        else:
            _OUTAGES.end(path)
            return result


def _reason(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _final_error(path: str | os.PathLike, error: OSError, patience_s: float) -> Exception:
    reason, scheme = _reason(error), scheme_of(path)
    if error.errno == errno.ENODATA:
        what, remedy = "a file of the data is shorter than dataset.json says", "Copy the whole dataset again"
        return UserError(what, str(path), remedy)
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "Give yourself permission to read it"
        if scheme:
            remedy = "Log in, or give the account of this machine the right to read the bucket's objects"
        return UserError(f"a shard of the data cannot be read ({reason})", str(path), remedy)
    if scheme and error.errno == errno.ENOENT:
        return UserError(f"an object of the data is gone ({reason})", str(path), "Restore it, or copy the set again")
    return StorageError(f"the data cannot be read since {patience_s:.0f} s: {reason}: {path}")


class _Outages:
    """Folders from which reads fail, with the time of the first failure after the last success."""

    def __init__(self):
        self._lock = threading.Lock()
        self._since_s: dict[str, float] = {}
        self._logged: set[str] = set()

    def duration_s(self, path: str | os.PathLike, reason: str, patience_s: float) -> float:
        """How long reads from the folder of `path` have been failing; logs it once it is more than a blip."""
        folder = os.path.dirname(path)
        with self._lock:
            duration_s = time.monotonic() - self._since_s.setdefault(folder, time.monotonic())
            is_news = duration_s >= min(_LOGGED_AFTER_S, patience_s) > 0 and folder not in self._logged
            if is_news:
                self._logged.add(folder)
        if is_news:
            _log(f"cannot read {path} ({reason}); retrying for up to {patience_s:.0f} s")
        return duration_s

    def end(self, path: str | os.PathLike) -> None:
        """Ends the outage of the folder of `path` after a successful read."""
        if not self._since_s:
            return
        folder = os.path.dirname(path)
        with self._lock:
            since_s = self._since_s.pop(folder, None)
            was_logged = folder in self._logged
            self._logged.discard(folder)
        if since_s is not None and was_logged:
            _log(f"{folder} can be read again, after {time.monotonic() - since_s:.1f} s")


_OUTAGES = _Outages()


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
