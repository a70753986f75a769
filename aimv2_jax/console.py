"""Console output that survives a closed pipe or terminal, and without the noise of libraries."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

# The reader, the terminal or the descriptor is gone for good.
_CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF)


def print_line(text: str, output: TextIO | None = None) -> None:
    """Prints `text` to `output`, by default stdout, and flushes it.

    Characters that the output's encoding lacks are escaped. A closed output is replaced by /dev/null, so that neither
    later prints nor Python's flush at exit end the program. A line that cannot be written now (full disk, full pipe) is
    dropped.
    """
    output = sys.stdout if output is None else output
    encoding = output.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=output, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # The stream may be closed or without a descriptor.
            _redirect_to_null(output, permanently=error.errno in _CLOSED)


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discards what is written to stderr meanwhile, by code in other languages too."""
    with tempfile.TemporaryFile() as sink:
        stderr = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _redirect_to_null(output: TextIO, permanently: bool) -> None:
    """Drops the contents of Python's buffer, and all later output if `permanently`."""
    descriptor = output.fileno()
    original = None if permanently else os.dup(descriptor)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    if original is not None:
        output.flush()
        os.dup2(original, descriptor)
        os.close(original)
