"""Files that appear whole or not at all: in a bucket all do, on a disk those that get their name at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` has a scheme such as gs://."""
    return "://" in os.fspath(path)


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Makes the file `path`, or replaces it: whoever looks sees the old one, or all of `data`."""
    if is_remote(path):
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    part = part_of(path)
    try:
        part.write_bytes(data)
        move_whole(part, path)
    except OSError as error:
        error.filename = str(path)  # Python leaves it out where a full disk has no room.
        raise
    finally:
        with contextlib.suppress(OSError):  # What went wrong before is what counts.
            part.unlink()


def move_whole(part: Path, path: epath.PathLike) -> None:
    """Makes the finished file `part` the file `path`, which is on the same file system or in a bucket."""
    if is_remote(path):
        epath.Path(part).copy(path, overwrite=True)
        part.unlink()
        return
    with part.open("rb") as file:
        os.fsync(file.fileno())  # Without, a crash of the machine could leave the name and not the bytes.
    part.replace(path)


def part_of(path: Path) -> Path:
    """A hidden name beside `path` for what is to become it; no other process has it, on whatever host."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
