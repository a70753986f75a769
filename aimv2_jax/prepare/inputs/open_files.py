"""Access to input files: local files are read in place, remote files through a temporary copy."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from aimv2_jax import untrusted
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage.bucket import file_system
from aimv2_jax.storage.files import is_remote, is_temporary, with_retries

MISSING = "no_image"  # The usual reason for a sample without an image.
MAX_FILE_BYTES = 256 << 20  # Per image, text or json; ten times the file of a 100-megapixel camera.
# Reads are large, because each read from a mounted bucket takes many milliseconds.
_READ_BYTES = 1 << 20
_COPY_BYTES = 16 << 20
# A decompression bomb unpacks to more than both limits. Deflate packs less than 1033:1, and images hardly compress.
_MIN_BOMB_BYTES, _MAX_EXPANSION = 1 << 30, 100
_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNREADABLE_REMEDY = "Fix its permissions, symlink or disk, or leave it out"


class FileUnavailable(Exception):
    """Raised if a file beside an input is not available, for `reason`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


@contextlib.contextmanager
def open_file(path: str, start: int = 0, stop: int | None = None) -> Iterator[BinaryIO]:
    """Opens `path` as a seekable file at byte `start`, to be read from there to `stop`.

    That range of a remote file is first copied to a temporary file.

    Raises:
      UserError, StorageError: if a remote file cannot be read or copied. Errors of a local disk stay OSErrors.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=_READ_BYTES) as file:
            file.seek(start)
            yield file
        return
    with temporary_file(path) as file:
        file.seek(start)  # The hole in the file takes no disk space.
        for data in _remote_pieces(path, start, sys.maxsize if stop is None else stop):
            file.write(data)
        file.seek(start)
        yield file


def _remote_pieces(path: str, start: int, stop: int) -> Iterator[bytes]:
    with input_errors(path):
        stop = min(stop, _size(path))
        while start < stop:
            data = _read_remote(path, start, min(start + _COPY_BYTES, stop))
            start += len(data)
            yield data


def max_unpacked_bytes(num_bytes: int) -> int:
    """Number of bytes that an input of `num_bytes` may unpack to; bytes beyond it are not read."""
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
        if error.errno in _FULL_DISK_ERRORS:
            raise _no_room(path, error) from error
        raise


def _no_room(path: str, error: OSError) -> UserError:
    what = f"no space in {tempfile.tempdir or 'TMPDIR'} for the copy of an input ({error.strerror})"
    return UserError(what, path, "Free some space there, or set TMPDIR to a folder on another disk")


@contextlib.contextmanager
def input_errors(path: str) -> Iterator[None]:
    """Converts errors of the disk or the bucket inside.

    Raises:
      StorageError: if a bucket failed, and may work later.
      UserError: about `path`, for every other error.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if is_temporary(error):
            raise StorageError(f"input cannot be read ({reason}): {path}") from error
        raise UserError(f"input cannot be read ({reason})", path, _UNREADABLE_REMEDY) from error


def file_size(path: str) -> int:
    """Size of a file in bytes; raises as `input_errors` if it cannot be read."""
    with input_errors(path):
        return _size(path)


def read_range(path: str, start: int, num_bytes: int) -> bytes:
    """Reads up to `num_bytes` from byte `start`; raises as `input_errors` if the file cannot be read."""
    with input_errors(path):
        if is_remote(path):
            return _read_remote(path, start, min(start + num_bytes, _size(path)))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(num_bytes)


def read_beside(folder: str, name: str, follow_links: bool = False) -> bytes:
    """Reads the file `name` of `folder`.

    Raises:
      FileUnavailable: `path_out_of_folder` if `name` leads out of `folder`, `link_out_of_folder` if a link leads out of
        a local one and must not be followed, `oversized_file` beyond `MAX_FILE_BYTES`, and `MISSING` if it does not
        exist or is no regular file.
      OSError: if a bucket fails temporarily.
    """
    if not _is_below(name):
        raise FileUnavailable("path_out_of_folder" if PurePosixPath(name).parts else MISSING)
    try:
        if is_remote(folder):
            return _read_whole(f"{folder}/{name}")
        return untrusted.read_file(os.path.join(folder, name), MAX_FILE_BYTES, None if follow_links else folder)
    except untrusted.OutsideFolder as error:
        raise FileUnavailable("link_out_of_folder") from error
    except untrusted.TooLarge as error:
        raise FileUnavailable("oversized_file") from error
    except (OSError, ValueError) as error:
        if is_temporary(error):  # Otherwise the dataset would depend on the moment at which it was prepared.
            raise
        raise FileUnavailable(MISSING) from error


def read_or_reason(folder: str, name: str, follow_links: bool) -> tuple[bytes | None, str]:
    """The bytes of the file `name` of `folder`, or None; and `MISSING`, or the reason of `read_beside`."""
    try:
        return read_beside(folder, name, follow_links), MISSING
    except FileUnavailable as error:
        return None, error.reason


def size_beside(folder: str, name: str) -> int:
    """Size of the file `name` of `folder` in bytes, following all links; 0 if there is none."""
    try:
        return min(_size(f"{folder}/{name}"), MAX_FILE_BYTES) if _is_below(name) else 0
    except (OSError, ValueError) as error:
        if is_temporary(error):
            raise
        return 0


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or is_remote(name))


def _size(path: str) -> int:
    if is_remote(path):
        return with_retries(lambda: file_system(path).size(path), path)
    return os.stat(path).st_size


def _read_whole(path: str) -> bytes:
    num_bytes = _size(path)
    if num_bytes > MAX_FILE_BYTES:
        raise untrusted.TooLarge(path)
    return _read_remote(path, 0, num_bytes)


def _read_remote(path: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of an object; raises OSError, ENODATA if it ends before."""

    def read() -> bytes:
        data = file_system(path).cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.ENODATA, "the object is shorter", path)
        return data

    return with_retries(read, path) if start < stop else b""
