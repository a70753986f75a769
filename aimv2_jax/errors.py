"""User errors as one-sentence messages, and the exit codes of the commands."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

from aimv2_jax.console import print_line
from aimv2_jax.untrusted import printable, shorten

EXIT_FINISHED = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_GUARD = 3
# The run hung, was killed, or its devices failed at the same step as before: a restart does not help.
EXIT_HUNG = 4
# Stopped on request, hung once, or ended by a device or a signal: the same command continues. TEMPFAIL in sysexits.h.
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130  # The convention of shells: 128 + SIGINT.

_MAX_MESSAGE_CHARS = 4000
_MAX_VALUE_CHARS = 300  # Enough for a path, too few to hide the sentence.
# Errors of the operating system whose cause is outside the program, with their remedies.
_SYSTEM_REMEDIES = {
    errno.EACCES: "Fix its permissions, or give another path",
    errno.EPERM: "Fix its permissions, or give another path",
    errno.EROFS: "Give a writable path",
    errno.ENOSPC: "Make room there, or give a path on another disk",
    errno.EDQUOT: "Make room there, or give a path on another disk",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.ELOOP: "Fix the symbolic link",
    errno.ENOTDIR: "Move the file away, since a folder is expected there, or give another path",
    errno.EISDIR: "Move the folder away, since a file is expected there, or give another path",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.EIO: "Check the disk, or give a path on another disk",
}


class UserError(Exception):
    """An error that the user can fix.

    Args:
      what: the problem, naming the config key, file or flag.
      value: the offending value.
      remedy: what to do about it, as a sentence without a full stop.
    """

    def __init__(self, what: str, value: object, remedy: str):
        self.what = what
        self.value = value
        self.remedy = remedy
        super().__init__(what, value, remedy)

    def __str__(self) -> str:
        # All three may contain untrusted text, such as a file's name.
        text = f"{self.what}: {shorten(repr(self.value), _MAX_VALUE_CHARS)}. {self.remedy}."
        return printable(" ".join(text.splitlines()), _MAX_MESSAGE_CHARS)


class TrainingAborted(Exception):
    """A guard stopped the run, to protect its checkpoints (non-finite loss, too much bad data)."""


class DeviceFailure(Exception):
    """A device, or the network between devices, failed.

    Args:
      message: what failed, and when.
      code: EXIT_RETRY, or EXIT_HUNG where it had failed at the same step before.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class StorageError(Exception):
    """Storage did not respond for a while; once it does, the same command continues.

    Args:
      message: what could not be read or written.
      code: EXIT_RETRY, or EXIT_HUNG where the same step could not be read before, while other records could.
    """

    def __init__(self, message: str, code: int = EXIT_RETRY):
        super().__init__(message)
        self.code = code


def describe_exit(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of a command that `error` ends; None for a bug of this package.

    A refusal of the operating system (disk full, no permission, ...) counts as a user error. Ctrl-C is not an error; it
    has the exit code of shells.
    """
    if isinstance(error, UserError):
        return EXIT_USER, f"error: {error}"
    if isinstance(error, TrainingAborted):
        return EXIT_GUARD, f"stopped: {error}"
    if isinstance(error, DeviceFailure):
        return error.code, f"error: {error}"
    if isinstance(error, StorageError):
        remedy = ". Start the same command again when the storage is back" if error.code == EXIT_RETRY else ""
        return error.code, f"stopped: {error}{remedy}"
    if isinstance(error, OSError) and "://" in str(error.filename):  # A bucket; see storage/files.py.
        if error.errno == errno.EAGAIN:
            return describe_exit(StorageError(f"{error.filename}: {error.strerror}"))
        remedy = "Check the name of the bucket and the rights of this machine's account"
        return describe_exit(UserError(f"the bucket cannot be used: {error.strerror}", error.filename, remedy))
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in _SYSTEM_REMEDIES:
        refusal = UserError(os.strerror(error.errno), error.filename, _SYSTEM_REMEDIES[error.errno])
        return EXIT_USER, f"error: {refusal}"
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def cli_main(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command's main: errors that `describe_exit` knows become one line on stderr and an exit code."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BaseException as error:
            described = describe_exit(error)
            if described is None:
                raise
            code, line = described
            print_line(line, sys.stderr)
            return code

    return wrapped
