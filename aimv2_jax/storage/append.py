"""Append-only files: written in place on a disk; uploaded periodically to a bucket, which cannot append."""

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

from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage.files import atomic_write, is_remote, is_temporary, make_parent, read_bytes

# Interval between uploads of a file. Each uploads the whole file, and a bucket accepts one write a second.
_UPLOAD_INTERVAL_S = 10.0


class Upload:
    """Background thread that mirrors the local file `local` to the file `path` of a bucket.

    A failed upload is retried at the next interval; only `flush` raises its error.
    """

    def __init__(self, local: Path, path: epath.PathLike):
        self._local = local
        self._path = path
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # Held during an upload.
        self._thread = threading.Thread(target=self._run, name=f"upload of {local.name}", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Marks the local file as changed; it is uploaded at the next interval."""
        self._changed.set()

    def flush(self) -> None:
        """Uploads the file if it has changed; raises OSError."""
        with self._lock:
            if not self._changed.is_set():
                return
            self._changed.clear()  # Cleared before reading, so that later writes are uploaded again.
            try:
                atomic_write(self._path, self._local.read_bytes())
            except OSError:
                self._changed.set()
                raise

    def close(self) -> None:
        """Ends the thread and flushes."""
        self._ended.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._ended.wait(_UPLOAD_INTERVAL_S):
            with contextlib.suppress(OSError):  # Retried; `flush` raises it.
                self.flush()


class AppendFile:
    """Append-only file; existing contents are kept. It is created at the first write.

    If a local file is deleted meanwhile, the next write creates it again; if its folder is deleted, that write raises.

    Args:
      path: local, or in a bucket; its folder is created. A symbolic link, a pipe or a device is refused.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._file = None
        self._upload: Upload | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def write(self, data: bytes) -> None:
        """Appends `data`: on a disk it is written when this returns, in a bucket some seconds later."""
        if self._file is None:
            make_parent(self._path)
            self._open()
        elif self._upload is None and _is_deleted(self._file):
            self._file.close()
            self._open()
        remaining = memoryview(data)
        while remaining:  # A full disk writes a part and raises at the next write.
            remaining = remaining[self._file.write(remaining) :]
        if self._upload is not None:
            self._upload.changed()

    def flush(self) -> None:
        """Waits until all data is at `path`; raises OSError."""
        if self._upload is not None:
            self._upload.flush()

    def close(self) -> None:
        """Flushes and closes the file; a later write opens it again."""
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
        try:
            before = read_bytes(self._path)
        except FileNotFoundError:
            before = b""
        self._folder = tempfile.TemporaryDirectory(prefix="upload-")
        local = Path(self._folder.name) / self._path.name
        local.write_bytes(before)
        self._file = local.open("ab", buffering=0)
        self._upload = Upload(local, self._path)


def _open_to_append(path: Path) -> BinaryIO:
    """Opens a regular file; raises `UserError` for any other, since a run must not change the target of a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # A link, or a pipe without a reader.
            raise
        raise UserError(
            "an output file of the run is not a regular file", str(path), "Remove the link or pipe"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError("an output file of the run is not a regular file", str(path), "Remove the pipe or device")
    return open(descriptor, "ab", buffering=0)


def _is_deleted(file: BinaryIO) -> bool:
    try:
        return os.fstat(file.fileno()).st_nlink == 0
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS: the file was deleted on another host.
            raise
        return True


def to_json(value: Any) -> Any:
    """Converts numbers of numpy, JAX or Python, text, lists and mappings to JSON types; non-finite numbers to None."""
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
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
    """Converts write errors inside the context to a `UserError` that names the file, or to a `StorageError`."""
    try:
        yield
    except OSError as error:
        if is_temporary(error):
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
        remedy = "Make room, or give a --workdir that can be written"
        raise UserError(f"{path} cannot be written", error.strerror or str(error), remedy) from error
