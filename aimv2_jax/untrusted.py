"""Safe reading of untrusted input: size-limited regular files, depth-limited JSON, values in range, terminal text.

All functions raise `ValueError` for content that they reject, and `OSError` for errors of the system, so that callers
can turn each into an error of their own. No function blocks on a pipe or reads without a limit.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 64 << 20
_MAX_JSON_DEPTH = 64
_MAX_PRINTED_CHARS = 200  # Limit for untrusted text in a report or an error.


class OutsideFolder(ValueError):
    """The file is outside the folder that must contain it."""


class TooLarge(ValueError):
    """The file is larger than the limit."""


def read_file(path: str | os.PathLike, max_bytes: int, inside: str | os.PathLike | None = None) -> bytes:
    """Reads a local regular file.

    Args:
      path: symbolic links are followed, unless they lead out of `inside`.
      max_bytes: the largest accepted size.
      inside: folder that must contain the file once all links are resolved.

    Raises:
      OutsideFolder: if it is outside `inside`.
      TooLarge: if it has more than `max_bytes`.
      ValueError: if it is not a regular file (a pipe, a device, a folder), or its name contains a zero byte.
      OSError: if the system cannot open it.
    """
    with open_regular(path, inside) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise TooLarge(f"it has {size:,} bytes, the limit is {max_bytes:,}")
        # The read is bounded, because files of /proc report 0 bytes and may never end. None: the read would block.
        data = file.read(size + 1) or b""
    if len(data) > size:
        raise ValueError("it grows while it is being read")
    return data


def open_regular(path: str | os.PathLike, inside: str | os.PathLike | None = None) -> BinaryIO:
    """Opens a local regular file for reading; arguments and errors are those of `read_file`."""
    path = os.fspath(path)
    if inside is not None:
        # Resolved first, so that the checked path is the opened one; O_NOFOLLOW rejects later links.
        path = os.path.realpath(path)
        if not _is_below(path, inside):
            raise OutsideFolder("it is outside the folder")
    # With O_NONBLOCK, opening a pipe without a writer returns at once.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if inside is not None else 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether `path` is in `folder` once the links of both are resolved.

    The link targets of a snapshot in a Hugging Face hub cache count as inside: they are in `blobs` beside `snapshots`.
    """
    return _is_below(os.path.realpath(path), folder)


def _is_below(path: str, folder: str | os.PathLike) -> bool:
    return any(os.path.commonpath([root, path]) == root for root in _roots(os.fspath(folder)))


@functools.lru_cache(maxsize=64)  # Called for each file of a folder.
def _roots(folder: str) -> tuple[str, ...]:
    real = Path(os.path.realpath(folder))
    hub = next((above.parent for above in (real, *real.parents) if above.name == "snapshots"), None)
    return (str(real),) if hub is None else (str(real), str(hub / "blobs"))


def parse_json(text: str | bytes, allow_nan: bool = False) -> Any:
    """Parses JSON whose arrays and objects nest up to `_MAX_JSON_DEPTH` deep.

    NaN and Infinity, which Python writes and RFC 8259 does not have, are refused unless `allow_nan`.

    Raises:
      ValueError: if it is not JSON, not UTF-8, or nested deeper.
    """
    try:
        tree = json.loads(text, parse_constant=None if allow_nan else _refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    if _depth(tree) > _MAX_JSON_DEPTH:
        raise ValueError("JSON nested too deep")
    return tree


def parse_json_object(text: str | bytes, allow_nan: bool = False) -> dict[str, Any]:
    """Parses a JSON object as `parse_json` does; also raises `ValueError` for anything but an object."""
    tree = parse_json(text, allow_nan)
    if not isinstance(tree, dict):
        raise ValueError("JSON, but not an object")
    return tree


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the JSON object in a local file; raises as `read_file` and `parse_json_object`."""
    return parse_json_object(read_file(path, MAX_JSON_BYTES))


def as_int(value: Any, low: int, high: int) -> int:
    """Returns `value` if it is an int (no bool, no float) from `low` to `high`; raises `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"not a whole number from {low} to {high}: {shorten(repr(value))}")
    return value


def as_number(value: Any, limit: float = 1e30) -> float:
    """Returns `value` as a float if it is a number (no bool) of at most `limit`; raises `ValueError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= limit:
        raise ValueError(f"not a number: {shorten(repr(value))}")
    return float(value)


def printable(text: str, limit: int = _MAX_PRINTED_CHARS) -> str:
    """Returns `text` on one line, control characters escaped for the terminal, shortened to `limit` characters."""
    text = shorten(text, limit)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shorten(text: str, limit: int = _MAX_PRINTED_CHARS) -> str:
    """Returns `text`, or its two ends around an ellipsis if it has more than `limit` characters."""
    half = max((limit - 5) // 2, 1)
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _depth(tree: Any) -> int:
    """Number of nested levels of arrays and objects, without recursion."""
    depth, level = 0, [tree]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
