"""What is said of checkpoints that cannot be written or read: of all that Orbax and TensorStore say, the cause."""

from __future__ import annotations

import logging
import os
import re


def is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax's threads log of an error which then reaches us, and is raised, anyway."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def human_bytes(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def reason_of(error: Exception) -> str:
    """Why a write failed: TensorStore's half a screen of nested messages ends in the operating system's number."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return first_line(error)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
