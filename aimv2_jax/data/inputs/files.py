"""Files wherever they lie: local ones are read in place, remote ones by way of a temporary copy."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from etils import epath

from aimv2_jax import untrusted
from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote

MISSING = "no_image"  # The reason for which most samples without a picture have none.
MAX_FILE_BYTES = 256 << 20  # Of one picture, text or json: ten times what a camera of 100 megapixels writes.
# Large, because a bucket that is mounted answers each read after many milliseconds.
_READ_BYTES = 1 << 20
_COPY_BYTES = 16 << 20
# A decompression bomb is what unpacks to more than both. Deflate cannot pack 1033 bytes in one, pictures hardly pack.
_MIN_BOMB_BYTES, _MAX_EXPANSION = 1 << 30, 100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MENDED = "Mend its rights, its link or its disk, or leave it out"
_Answer = TypeVar("_Answer")


class NoFile(Exception):
    """A file beside an input cannot be had, for `reason`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


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
    with temporary_file(path) as file:
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


def max_unpacked(num_bytes: int) -> int:
    """How many bytes an input of `num_bytes` may unpack to; what comes after them is not read."""
    return max(_MIN_BOMB_BYTES, _MAX_EXPANSION * num_bytes)


@contextlib.contextmanager
def temporary_file(path: str) -> Iterator[BinaryIO]:
    """A file for a copy of the input `path` in the folder of temporary files (TMPDIR); it goes at the end.

    Raises:
      UserError: if none can be made, or that folder becomes full.
    """
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError as error:
        raise _no_room(path, error) from error
    try:
        with file:
            yield file
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(path, error) from error
        raise


def _no_room(path: str, error: OSError) -> UserError:
    what = f"no room in {tempfile.tempdir or 'TMPDIR'} for the copy of an input ({error.strerror})"
    return UserError(what, path, "Make room there, or set TMPDIR to a folder on another disk")


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


def read_beside(folder: str, name: str, follow_links: bool = False) -> bytes:
    """Reads the file `name` of `folder`.

    Raises:
      NoFile: `link_out_of_folder` if a link leads out of a local `folder` and is not to be followed, `oversized_file`
        beyond `MAX_FILE_BYTES`, and `MISSING` if it is not there, no regular file, or `name` leads out of `folder`.
    """
    if not _is_below(name):
        raise NoFile(MISSING)
    try:
        if is_remote(folder):
            return _read_remote(f"{folder}/{name}")
        return untrusted.read_file(os.path.join(folder, name), MAX_FILE_BYTES, None if follow_links else folder)
    except untrusted.OutsideFolder as error:
        raise NoFile("link_out_of_folder") from error
    except untrusted.TooLarge as error:
        raise NoFile("oversized_file") from error
    except (OSError, ValueError) as error:
        raise NoFile(MISSING) from error


def size_beside(folder: str, name: str) -> int:
    """The bytes of the file `name` of `folder`, whatever links lead to it; 0 if there is none."""
    with contextlib.suppress(Exception):  # The backends of buckets raise kinds of their own.
        if _is_below(name):
            return min(epath.Path(f"{folder}/{name}").stat().length, MAX_FILE_BYTES)
    return 0


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or is_remote(name))


def _read_remote(path: str) -> bytes:
    data = None
    # The backends raise kinds of their own; one picture that cannot be had is one sample without a picture.
    with contextlib.suppress(Exception), epath.Path(path).open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if data is None:
        raise FileNotFoundError(path)
    if len(data) > MAX_FILE_BYTES:
        raise untrusted.TooLarge(path)
    return data
