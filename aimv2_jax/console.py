"""Lines for people, on outputs that may be gone: a pipe whose reader ended, a terminal that was closed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def print_line(text: str, output: TextIO | None = None) -> None:
    """Prints `text` to `output`, by default the standard one, and flushes it.

    Characters that its encoding does not have are escaped. An output that cannot be written is replaced by /dev/null:
    whatever is printed later, and what Python still flushes at its end, must not end the program, either.
    """
    output = sys.stdout if output is None else output
    encoding = output.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=output, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # A stream without a descriptor, or one that is closed.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, output.fileno())
            os.close(null)
