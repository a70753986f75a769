"""Lines for people, on outputs that may be gone: a pipe whose reader ended, a terminal that was closed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # No reader, no terminal, no descriptor: for good.


def print_line(text: str, output: TextIO | None = None) -> None:
    """Prints `text` to `output`, by default the standard one, and flushes it.

    Characters that its encoding does not have are escaped. An output that is gone is replaced by /dev/null: whatever is
    printed later, and what Python still flushes at its end, must not end the program, either. Where only this line
    cannot be written (a full disk, a pipe that takes no more just now), it is dropped.
    """
    output = sys.stdout if output is None else output
    encoding = output.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=output, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # A stream without a descriptor, or one that is closed.
            _to_null(output, for_good=error.errno in _GONE)


def _to_null(output: TextIO, for_good: bool) -> None:
    """Drops what is in Python's buffer, or with `for_good` whatever comes."""
    descriptor = output.fileno()
    kept = None if for_good else os.dup(descriptor)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    if kept is not None:
        output.flush()
        os.dup2(kept, descriptor)
        os.close(kept)
