"""Shard writer: ArrayRecord files of about equal size, each written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from aimv2_jax.storage.files import atomic_move, part_path

# With group_size 1 a random read takes 25 us, with 64 it takes 500. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# array_record reports operating system errors as text only.
_ERRNO_BY_MESSAGE = {
    os.strerror(number): number
    for number in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
        *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE),
    )
}

MoveFile = Callable[[Path, str], None]
"""Moves a finished local file to its destination, under the given name."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a dataset, as listed in `dataset.json`."""

    file: str
    records: int
    bytes: int


class ShardWriter:
    """Writes items in order to `PREFIX00000.arrayrecord`, …; equal items give equal bytes.

    The item that brings a shard to `limit` bytes is its last; the shard is then moved to its destination. A shard that
    an error interrupts is removed. `shards` lists the moved shards.

    Args:
      scratch: the local folder in which a shard is written.
      move: moves a finished shard to its destination.
    """

    def __init__(self, scratch: Path, move: MoveFile, limit: int, prefix: str = ""):
        self.shards: list[Shard] = []
        self._scratch = scratch
        self._move = move
        self._limit = limit
        self._prefix = prefix
        self._writer: Any = None
        self._part: Path | None = None
        self._count = self._size = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()

    def write(self, item: bytes) -> None:
        """Appends `item` to the open shard, or to a new one.

        Raises:
          OSError: if the system refuses the write, or the move of a full shard; the shard is then lost.
        """
        if self._writer is None:
            self._part = part_path(self._scratch / self._name())
            with _as_os_errors(self._part):
                self._writer = ArrayRecordWriter(str(self._part), _WRITER_OPTIONS)
        with _as_os_errors(self._part):
            self._writer.write(item)
        self._count += 1
        self._size += len(item)
        if self._size >= self._limit:
            self._finish()

    def _finish(self) -> None:
        if self._writer is None:
            return
        assert self._part is not None
        with _as_os_errors(self._part):
            self._writer.close()
        self._writer = None
        shard = Shard(self._name(), self._count, self._part.stat().st_size)
        self._move(self._part, shard.file)
        self.shards.append(shard)
        self._part = None
        self._count = self._size = 0

    def _name(self) -> str:
        return f"{self._prefix}{len(self.shards):05d}.arrayrecord"

    def _abandon(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # The error was raised already.
                self._writer.close()
            self._writer = None
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def move_into(folder: Path) -> MoveFile:
    """A `MoveFile` that moves files into `folder`, on the same file system."""
    return lambda part, name: atomic_move(part, folder / name)


@contextlib.contextmanager
def _as_os_errors(path: Path | None) -> Iterator[None]:
    """Raises array_record's errors about the operating system as `OSError`."""
    try:
        yield
    except RuntimeError as error:
        for message, number in _ERRNO_BY_MESSAGE.items():
            if message in str(error):
                raise OSError(number, message, str(path)) from error
        raise
