"""Files that grow while a run goes on: in place on a disk; in a bucket, which cannot append, by uploads."""

from __future__ import annotations

import contextlib
import errno
import math
import numbers
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote, write_whole

_BETWEEN_S = 10.0  # Uploads of one file: each is of the whole file, and a bucket takes one a second at most.


class Upload:
    """Keeps the file `path` of a bucket like the local file `local`, from a thread.

    What a bucket refuses once, it may take the next time: only `flush` raises it.
    """

    def __init__(self, local: Path, path: epath.PathLike):
        self._local, self._path = local, path
        self._changed, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # Held by who uploads.
        self._thread = threading.Thread(target=self._run, name=f"upload of {local.name}", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """The local file has grown: it is uploaded soon."""
        self._changed.set()

    def flush(self) -> None:
        """Returns when the bucket has all of it; raises what the bucket raises."""
        with self._lock:
            if not self._changed.is_set():
                return
            self._changed.clear()  # Before it is read: what is written meanwhile will be uploaded again.
            try:
                write_whole(self._path, self._local.read_bytes())
            except Exception:
                self._changed.set()
                raise

    def close(self) -> None:
        """Ends the thread, and flushes."""
        self._ended.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._ended.wait(_BETWEEN_S):
            with contextlib.suppress(Exception):  # Tried again, and told by `flush`.
                self.flush()


class GrowingFile:
    """A file at whose end is written; what `path` holds before stays. It is made at the first write.

    Where a local one is deleted meanwhile, the next write makes it again; where its folder is, that is an error.

    Args:
      path: local, or in a bucket; its folder is made. A symbolic link, a pipe or a device is refused.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._file = None
        self._upload: Upload | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def write(self, data: bytes) -> None:
        """Writes at the end: on a disk when this returns, in a bucket some seconds later."""
        if self._file is None:
            if not is_remote(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        elif self._upload is None and _is_deleted(self._file):
            self._file.close()
            self._open()
        left = memoryview(data)
        while left:  # A full disk takes a part of it, and says so at the next.
            left = left[self._file.write(left) :]
        if self._upload is not None:
            self._upload.changed()

    def flush(self) -> None:
        """Returns when all is where it belongs; an OSError, or the bucket's own, where that cannot be."""
        if self._upload is not None:
            self._upload.flush()

    def close(self) -> None:
        """Flushes and closes it; a later write opens it again."""
        file, upload, folder = self._file, self._upload, self._folder
        self._file = self._upload = self._folder = None
        try:
            if upload is not None:
                upload.close()
        finally:
            if file is not None:
                file.close()
            if folder is not None:
                folder.cleanup()

    def _open(self) -> None:
        if not is_remote(self._path):
            self._file = _open_to_append(Path(self._path))
            return
        self._folder = tempfile.TemporaryDirectory(prefix="upload-")
        local = Path(self._folder.name) / self._path.name
        if self._path.exists():
            local.write_bytes(self._path.read_bytes())
        self._file = local.open("ab", buffering=0)
        self._upload = Upload(local, self._path)


def _open_to_append(path: Path) -> BinaryIO:
    """Raises `UserError` for anything but a regular file: what a link leads to is not the run's to change."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # A link; a pipe that nobody reads.
            raise
        raise UserError("a file that the run writes is none", str(path), "Remove the link or pipe") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("a file that the run writes is none", str(path), "Remove the pipe or device")
    return open(descriptor, "ab", buffering=0)


def _is_deleted(file: BinaryIO) -> bool:
    try:
        return os.fstat(file.fileno()).st_nlink == 0
    except OSError as error:
        if error.errno != errno.ESTALE:  # Deleted on another host of an NFS.
            raise
        return True


def plain(value: Any) -> Any:
    """Numbers of numpy, JAX or Python, text, and lists and mappings of them, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, numbers.Number):
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Whatever the place of `path` refuses inside is a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_remote(path):  # Of a bucket: TensorFlow's or fsspec's own kinds.
            said = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{path} cannot be written", said, "Make room, or give a --workdir that can be") from error
        raise
