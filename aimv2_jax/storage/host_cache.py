"""Cache on a host's disk of what a bucket holds: a dataset's index, and its records up to a limit.

All processes of a host share it, and any of them may be killed at any time. A record is kept at its own offset in a
sparse copy of its shard, and is complete if its checksum fits, so nothing else needs to be written about it. A record
is never dropped: training reads each one once an epoch, so that whatever is dropped to make room would miss as often as
what it makes room for.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.storage.bucket import ObjectFolder
from aimv2_jax.storage.ordered import map_in_order
from aimv2_jax.storage.retries import retry

_COPY_BYTES = 32 << 20
_COPY_THREADS = 8
_USED = struct.Struct("<Q")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class HostCache:
    """The cache's folder and the limit of the records in it.

    `folder` None is a folder in the system's temporary folder; with `max_bytes` 0 no records are kept.
    """

    folder: str | None = None
    max_bytes: int = 0

    def path(self, key: str) -> Path:
        """The folder for the dataset with this key, which is created.

        Raises:
          UserError: if it cannot be created.
        """
        root = self.folder or os.path.join(tempfile.gettempdir(), f"aimv2_jax-{os.getuid()}")
        path = Path(os.path.expanduser(root)) / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.mkdir(exist_ok=True, mode=0o700)
            if path.stat().st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
        except OSError as error:
            reason = f"{root} ({error.strerror})"
            raise UserError(
                "the cache folder cannot be made", reason, "Set data.cache_dir to a folder on a disk"
            ) from error
        return path

    def copy_once(
        self, key: str, source: ObjectFolder, url: str, name: str, num_bytes: int, crc32: int, patience_s: float
    ) -> Path:
        """The local copy of an object, made by the first process of the host that asks; the others wait for it.

        Raises:
          UserError: if the disk has no room for it, or the object has other contents than `crc32`.
          StorageError: if the bucket fails for longer than `patience_s`.
        """
        folder = self.path(key)
        path = folder / name
        try:
            with _lock(folder / "lock"):
                if path.exists() and path.stat().st_size == num_bytes:
                    return path
                part = folder / f"{name}.part"  # Only the holder of the lock writes it.
                part.unlink(missing_ok=True)  # Left by a killed process.
                free = shutil.disk_usage(folder).free
                if free < num_bytes:
                    raise OSError(errno.ENOSPC, f"{num_bytes:,} bytes are needed and {free:,} free", str(folder))
                with part.open("wb") as file:
                    found = _copy(source, f"{url}/{name}", name, num_bytes, patience_s, file.write)
                    os.fsync(file.fileno())  # Otherwise a crash of the machine could leave a file of zeros.
                if found != crc32:
                    part.unlink()
                    remedy = "Copy the whole dataset again"
                    raise UserError(f"{name} of the data has other contents than dataset.json says", url, remedy)
                part.replace(path)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            reason = f"{folder} ({error.strerror})"
            remedy = "Free some space there, or set data.cache_dir to a folder on another disk"
            raise UserError("no room for the index of the data", reason, remedy) from error
        return path

    def check_room(self, key: str) -> None:
        """Raises `UserError` if the disk has no room for `max_bytes` of records, less those that it already has."""
        folder = self.path(key)
        room = shutil.disk_usage(folder).free + _used(folder)
        if room < self.max_bytes:
            remedy = "Lower it, free some space, or set data.cache_dir to a folder on another disk"
            value = f"{self.max_bytes / 1e9:.6g} GB, {folder} has room for {room / 1e9:.6g} GB"
            raise UserError("data.cache_gb is more than the disk has room for", value, remedy)


class CachedFolder:
    """A folder of a bucket whose ranges are kept on this host's disk, as long as there is room.

    Args:
      source: the folder.
      cache: the folder on the disk (`HostCache.path`).
      max_bytes: limit of the kept ranges.
      is_complete: whether the bytes of a range are those of the source, by their own checksum.
    """

    def __init__(self, source: ObjectFolder, cache: Path, max_bytes: int, is_complete: Callable[[bytes], bool]):
        self._source = source
        self._cache = cache
        self._max_bytes = max_bytes
        self._is_complete = is_complete
        self._is_full = False
        self._lock = threading.Lock()

    def __reduce__(self):
        return CachedFolder, (self._source, self._cache, self._max_bytes, self._is_complete)

    def read(self, name: str, start: int, stop: int) -> bytes:
        data = _pread(self._cache / name, start, stop - start)
        if data is not None and self._is_complete(data):
            return data
        data = self._source.read(name, start, stop)
        if not self._is_full and self._is_complete(data):
            self._keep(name, start, data)
        return data

    def read_all(self, name: str) -> bytes:
        return self._source.read_all(name)

    def sizes(self) -> dict[str, int]:
        return self._source.sizes()

    def _keep(self, name: str, start: int, data: bytes) -> None:
        try:
            if not _reserve(self._cache, len(data), self._max_bytes):
                self._is_full = True
                return
            descriptor = os.open(self._cache / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, data, start)
            finally:
                os.close(descriptor)
        except OSError as error:  # The cache only saves requests; training goes on without it.
            with self._lock:
                if self._is_full:
                    return
                self._is_full = True
            print_line(f"the cache {self._cache} keeps no more records ({error.strerror})", sys.stderr)


def _copy(
    source: ObjectFolder, url: str, name: str, num_bytes: int, patience_s: float, write: Callable[[bytes], object]
) -> int:
    """Copies an object in order, several ranges at a time; returns its CRC-32."""
    crc32 = 0

    def read(start: int) -> bytes:
        stop = min(start + _COPY_BYTES, num_bytes)
        return retry(partial(source.read, name, start, stop), url, patience_s)

    for data in map_in_order(read, range(0, num_bytes, _COPY_BYTES), _COPY_THREADS):
        crc32 = zlib.crc32(data, crc32)
        write(data)
    return crc32


def _pread(path: Path, start: int, length: int) -> bytes | None:
    """Bytes of a local file; None if there is no such file, or it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.pread(descriptor, length, start)
    except OSError:
        return None
    finally:
        os.close(descriptor)


class _lock:
    """Exclusive lock of a file, which the system releases when its holder ends in any way."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> int:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return self._descriptor

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)


def _used(folder: Path) -> int:
    data = _pread(folder / "used", 0, _USED.size)
    return _USED.unpack(data)[0] if data and len(data) == _USED.size else 0


def _reserve(folder: Path, num_bytes: int, max_bytes: int) -> bool:
    """Adds to the number of bytes that the host's processes keep in `folder`, unless that exceeds `max_bytes`.

    It is counted before the bytes are written, so that a kill in between leaves a number too high, never too low.
    """
    with _lock(folder / "used") as descriptor:
        data = os.pread(descriptor, _USED.size, 0)
        used = _USED.unpack(data)[0] if len(data) == _USED.size else 0
        if used + num_bytes > max_bytes:
            return False
        os.pwrite(descriptor, _USED.pack(used + num_bytes), 0)
    return True
