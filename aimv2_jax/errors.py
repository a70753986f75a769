"""What a user can mend, told in one sentence; and the exit codes of the commands."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

from aimv2_jax.console import print_line
from aimv2_jax.untrusted import printable

EXIT_FINISHED = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_GUARD = 3
EXIT_HUNG = 4  # It hung, was killed, or its devices failed where it had before: starting it again is no help.
# Stopped on request, hung once, or ended by a device or a signal: the same command goes on. TEMPFAIL in sysexits.h.
EXIT_AGAIN = 75
EXIT_INTERRUPTED = 130  # As shells have it: 128 and the number of SIGINT.

_MAX_SENTENCE = 4000
_MAX_SHOWN = 300  # Letters of an offending value: enough for a path, too few to hide the sentence.
# What an operating system refuses for reasons that lie outside the program, and what to do about it.
_REFUSALS = {
    errno.EACCES: "Give yourself the right to it, or name another place",
    errno.EPERM: "Give yourself the right to it, or name another place",
    errno.EROFS: "Name a place that can be written",
    errno.ENOSPC: "Make room there, or name a place on another disk",
    errno.EDQUOT: "Make room there, or name a place on another disk",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.ENAMETOOLONG: "Name another place",
    errno.ELOOP: "Mend the symbolic link",
    errno.ENOTDIR: "Move the file away that lies where a folder is expected, or name another place",
    errno.EISDIR: "Move the folder away that lies where a file is expected, or name another place",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.EIO: "Look after the disk, or name a place on another",
}


class UserError(Exception):
    """Something the user can mend.

    Args:
      what: what is wrong, naming the config key, file or flag.
      value: the offending value.
      remedy: what to do about it, as a sentence without its full stop.
    """

    def __init__(self, what: str, value: object, remedy: str):
        self.what, self.value, self.remedy = what, value, remedy
        super().__init__(what, value, remedy)

    def __str__(self) -> str:
        # What others wrote, such as a file's name, may stand in all three.
        return printable(" ".join(f"{self.what}: {_shown(self.value)}. {self.remedy}.".splitlines()), _MAX_SENTENCE)


def _shown(value: object) -> str:
    text = repr(value)
    half = _MAX_SHOWN // 2
    return text if len(text) <= _MAX_SHOWN else f"{text[:half]} ... {text[-half:]}"


class GuardStop(Exception):
    """The run stopped itself to protect what it has (non-finite loss, too much bad data)."""


class DeviceFailure(Exception):
    """A device, or the network between devices, failed.

    Args:
      told: what failed, and when.
      code: EXIT_AGAIN, or EXIT_HUNG where it had failed at the same step before.
    """

    def __init__(self, told: str, code: int):
        super().__init__(told)
        self.code = code


class StorageError(Exception):
    """Storage that did not answer for a while; when it does again, the same command goes on.

    Args:
      told: what could not be read.
      code: EXIT_AGAIN, or EXIT_HUNG where the same step could not be read before, and the rest could.
    """

    def __init__(self, told: str, code: int = EXIT_AGAIN):
        super().__init__(told)
        self.code = code


def last_words(error: BaseException) -> tuple[int, str] | None:
    """The exit code of a command that `error` ends, and the line about it; None where that is our bug.

    A file or folder that the operating system refuses (no room, no right, ...) is the user's to mend, too; Ctrl-C is no
    error, and its code is that of shells.
    """
    if isinstance(error, UserError):
        return EXIT_USER, f"error: {error}"
    if isinstance(error, GuardStop):
        return EXIT_GUARD, f"stopped: {error}"
    if isinstance(error, DeviceFailure):
        return error.code, f"error: {error}"
    if isinstance(error, StorageError):
        when = ". Start the same command again when it can be" if error.code == EXIT_AGAIN else ""
        return error.code, f"stopped: {error}{when}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        refusal = UserError(os.strerror(error.errno), error.filename, _REFUSALS[error.errno])
        return EXIT_USER, f"error: {refusal}"
    return None


def reports_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command's main: what has `last_words` becomes that line and code."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BaseException as error:
            words = last_words(error)
            if words is None:
                raise
            code, line = words
            print_line(line, sys.stderr)
            return code

    return wrapped
