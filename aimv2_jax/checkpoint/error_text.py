"""Short error messages for checkpoint I/O failures: the cause, without the rest of Orbax's and TensorStore's text."""

from __future__ import annotations

import logging
import os
import re

from aimv2_jax.errors import first_line


def drop_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """Logging filter against tracebacks that Orbax's threads log; the same errors are raised in the caller."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def human_bytes(num_bytes: float) -> str:
    """Formats a size with binary units, as `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def reason_of(error: Exception) -> str:
    """The cause of a failed read or write; TensorStore's nested messages end in the operating system's error number."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return first_line(error)
