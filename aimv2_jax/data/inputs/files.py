"""Files wherever they lie: local ones are read in place, remote ones by way of a temporary copy."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote

MAX_FILE_BYTES = 256 << 20  # Of one picture, text or json: ten times what a camera of 100 megapixels writes.
# Large, because a bucket that is mounted answers each read after many milliseconds.
_READ_BYTES = 1 << 20
_COPY_BYTES = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MENDED = "Mend its rights, its link or its disk, or leave it out"
_Answer = TypeVar("_Answer")


@contextlib.contextmanager
def open_file(path: str, start: int = 0, stop: int | None = None) -> Iterator[BinaryIO]:
    """`path` as a file that can seek, standing at byte `start`: to be read from there to `stop`.

    Of a remote one, that part is copied to a temporary file first.

    Raises:
      UserError: if a remote file cannot be read, or copied. What a local disk refuses stays an OSError.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=_READ_BYTES) as file:
            file.seek(start)
            yield file
        return
    with temporary_file() as file:
        file.seek(start)  # A hole, which takes no room.
        for data in _remote_pieces(path, start, sys.maxsize if stop is None else stop):
            file.write(data)
        file.seek(start)
        yield file


def _remote_pieces(path: str, start: int, stop: int) -> Iterator[bytes]:
    with remote_errors(path), epath.Path(path).open("rb") as file:
        file.seek(start)
        while data := file.read(min(_COPY_BYTES, stop - start)):
            start += len(data)
            yield data


@contextlib.contextmanager
def temporary_file() -> Iterator[BinaryIO]:
    """A file in the folder of temporary files (TMPDIR); it goes at the end.

    Raises:
      UserError: if none can be made, or that folder becomes full.
    """
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as error:
        raise _no_room(error) from error
    try:
        with file:
            yield file
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(error) from error
        raise


def _no_room(error: OSError) -> UserError:
    what = f"no room for the copy of an input ({error.strerror})"
    return UserError(what, tempfile.tempdir or "TMPDIR", "Make room there, or set TMPDIR to a folder on another disk")


@contextlib.contextmanager
def remote_errors(path: str) -> Iterator[None]:
    """Whatever goes wrong inside is told as a `UserError` about `path`."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:  # What epath knows by its scheme, and nothing more of it.
        remedy = "Give a local path, or one in a bucket (gs://)"
        raise UserError("no such kind of place is known", path, remedy) from error
    except Exception as error:  # TensorFlow's and fsspec's own kinds, which cannot be named without importing them.
        raise UserError("input cannot be read", path, f"Look after it: {error}") from error


def size(path: str) -> int:
    """Its bytes; raises `UserError` if there is no such file that can be read."""
    return asked(path, lambda: epath.Path(path).stat().length)


def part(path: str, start: int, num_bytes: int) -> bytes:
    """`num_bytes` of it from `start`, or fewer; raises `UserError` if it cannot be read."""

    def ask() -> bytes:
        with epath.Path(path).open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    return asked(path, ask)


def asked(path: str, question: Callable[[], _Answer]) -> _Answer:
    """The answer to a `question` about `path`; what the system or the bucket refuses becomes a `UserError`."""
    if is_remote(path):
        with remote_errors(path):
            return question()
    try:
        return question()
    except OSError as error:
        raise UserError(f"input cannot be read ({error.strerror})", path, _MENDED) from error


def read_beside(folder: str, name: str) -> bytes | None:
    """The file `name` of `folder`; None if it is missing, too large, no regular file, or outside of `folder`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or is_remote(name) or not path.parts:
        return None
    try:
        target = epath.Path(folder) / name
        if is_remote(folder):
            # The backends raise kinds of their own; one picture that cannot be had is one sample without a picture.
            with contextlib.suppress(Exception), target.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
                return data if len(data) <= MAX_FILE_BYTES else None
            return None
        # Asked before it is opened: to open a pipe would wait for ever.
        facts = os.stat(target)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_FILE_BYTES:
            return None
        return target.read_bytes()
    except (OSError, ValueError):  # ValueError: a name with a zero byte in it.
        return None
