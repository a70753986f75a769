"""Files wherever they lie: local ones are read in place, remote ones by way of a temporary copy."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from etils import epath

from aimv2_jax.errors import UserError

MAX_FILE_BYTES = 256 << 20  # Of one picture, text or json: ten times what a camera of 100 megapixels writes.
# Large, because a bucket that is mounted answers each read after many milliseconds.
_READ_BYTES = 1 << 20
_COPY_BYTES = 16 << 20
_MENDED = "Mend its rights, its link or its disk, or leave it out"
_Answer = TypeVar("_Answer")


def is_remote(path: str) -> bool:
    """Whether `path` has a scheme such as gs://."""
    return "://" in path


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """`path` as a file that can seek; a remote one is copied to the folder of temporary files first (TMPDIR).

    Raises:
      UserError: if a remote file cannot be read. What a local disk refuses stays an OSError.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=_READ_BYTES) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        with remote_errors(path), room_for_copies(file), epath.Path(path).open("rb") as source:
            shutil.copyfileobj(source, file, _COPY_BYTES)
        file.seek(0)
        yield file


@contextlib.contextmanager
def room_for_copies(file: BinaryIO) -> Iterator[None]:
    """Tells that there is no room for what is written to the temporary `file`, which is no fault of the input's."""
    try:
        yield
        file.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"no room for the copy of an input ({error.strerror})"
        with contextlib.suppress(OSError):  # Which tries once more to write.
            file.close()
        remedy = "Make room there, or set TMPDIR to a folder on another disk"
        raise UserError(what, tempfile.gettempdir(), remedy) from error


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
    return _asked(path, lambda: epath.Path(path).stat().length)


def part(path: str, start: int, num_bytes: int) -> bytes:
    """`num_bytes` of it from `start`, or fewer; raises `UserError` if it cannot be read."""

    def ask() -> bytes:
        with epath.Path(path).open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    return _asked(path, ask)


def _asked(path: str, question: Callable[[], _Answer]) -> _Answer:
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
