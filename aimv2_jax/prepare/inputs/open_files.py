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

from etils import epath

from aimv2_jax import untrusted
from aimv2_jax.errors import UserError
from aimv2_jax.storage.files import is_remote

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
      UserError: if a remote file cannot be read or copied. Errors of a local disk stay OSErrors.
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
    with input_errors(path), epath.Path(path).open("rb") as file:
        file.seek(start)
        while data := file.read(min(_COPY_BYTES, stop - start)):
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
    """Converts errors of the system or the bucket inside to a `UserError` about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path):
            if not isinstance(error, OSError):
                raise
            raise UserError(f"input cannot be read ({error.strerror})", path, _UNREADABLE_REMEDY) from error
        if isinstance(error, KeyError):  # epath raises it for schemes that it does not support.
            remedy = "Give a local path, or one in a bucket (gs://)"
            raise UserError("the storage scheme is not supported", path, remedy) from error
        # TensorFlow and fsspec raise their own types, which cannot be named without importing them.
        raise UserError("input cannot be read", path, f"Fix the cause: {error}") from error


def file_size(path: str) -> int:
    """Size of a file in bytes; raises `UserError` if it cannot be read."""
    with input_errors(path):
        return epath.Path(path).stat().length


def read_range(path: str, start: int, num_bytes: int) -> bytes:
    """Reads up to `num_bytes` from byte `start`; raises `UserError` if the file cannot be read."""
    with input_errors(path), epath.Path(path).open("rb") as file:
        file.seek(start)
        return file.read(num_bytes)


def read_beside(folder: str, name: str, follow_links: bool = False) -> bytes:
    """Reads the file `name` of `folder`.

    Raises:
      FileUnavailable: `link_out_of_folder` if a link leads out of a local `folder` and must not be followed,
        `oversized_file` beyond `MAX_FILE_BYTES`, and `MISSING` if it does not exist, is no regular file, or `name`
        leads out of `folder`.
    """
    if not _is_below(name):
        raise FileUnavailable(MISSING)
    try:
        if is_remote(folder):
            return _read_remote(f"{folder}/{name}")
        return untrusted.read_file(os.path.join(folder, name), MAX_FILE_BYTES, None if follow_links else folder)
    except untrusted.OutsideFolder as error:
        raise FileUnavailable("link_out_of_folder") from error
    except untrusted.TooLarge as error:
        raise FileUnavailable("oversized_file") from error
    except (OSError, ValueError) as error:
        raise FileUnavailable(MISSING) from error


def size_beside(folder: str, name: str) -> int:
    """Size of the file `name` of `folder` in bytes, following all links; 0 if there is none."""
    with contextlib.suppress(Exception):  # Bucket backends raise their own types.
        if _is_below(name):
            return min(epath.Path(f"{folder}/{name}").stat().length, MAX_FILE_BYTES)
    return 0


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or is_remote(name))


def _read_remote(path: str) -> bytes:
    data = None
    # Bucket backends raise their own types. An image that cannot be read only costs its sample.
    with contextlib.suppress(Exception), epath.Path(path).open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if data is None:
        raise FileNotFoundError(path)
    if len(data) > MAX_FILE_BYTES:
        raise untrusted.TooLarge(path)
    return data
