"""Shards: ArrayRecord files of about one size, each of which appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from aimv2_jax.files import move_whole, part_of

# group_size 1: a random read takes 25 us, at 64 it takes 500. Pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# array_record tells what the system refused in words only.
_REFUSALS = {
    os.strerror(number): number
    for number in (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
        *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE),
    )
}

Place = Callable[[Path, str], None]
"""Puts a finished local file where it belongs, under a name; the file is gone from where it was."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a data set, as `dataset.json` lists it."""

    file: str
    records: int
    bytes: int


class ShardWriter:
    """Writes items to `PREFIX00000.arrayrecord`, … in their order; equal items give equal bytes.

    Each shard is closed by the item that brings it to `limit` bytes and is then placed; one that an error interrupts
    leaves nothing. `shards` lists those that are placed.

    Args:
      scratch: the local folder where a shard grows.
      place: puts it where it belongs.
    """

    def __init__(self, scratch: Path, place: Place, limit: int, prefix: str = ""):
        self.shards: list[Shard] = []
        self._scratch, self._place, self._limit, self._prefix = scratch, place, limit, prefix
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
        """Appends `item`, to the shard that grows or to a new one.

        Raises:
          OSError: if the system refuses, here or as a full shard is placed; the shard is lost then.
        """
        if self._writer is None:
            self._part = part_of(self._scratch / self._name())
            with _refusals(self._part):
                self._writer = ArrayRecordWriter(str(self._part), _WRITER_OPTIONS)
        with _refusals(self._part):
            self._writer.write(item)
        self._count += 1
        self._size += len(item)
        if self._size >= self._limit:
            self._finish()

    def _finish(self) -> None:
        if self._writer is None:
            return
        assert self._part is not None
        with _refusals(self._part):
            self._writer.close()
        self._writer = None
        shard = Shard(self._name(), self._count, self._part.stat().st_size)
        self._place(self._part, shard.file)
        self.shards.append(shard)
        self._part, self._count, self._size = None, 0, 0

    def _name(self) -> str:
        return f"{self._prefix}{len(self.shards):05d}.arrayrecord"

    def _abandon(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # It has told why already.
                self._writer.close()
            self._writer = None
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def place_in(folder: Path) -> Place:
    """Places files in `folder`, on the same file system."""
    return lambda part, name: move_whole(part, folder / name)


@contextlib.contextmanager
def _refusals(path: Path | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        for words, number in _REFUSALS.items():
            if words in str(error):
                raise OSError(number, words, str(path)) from error
        raise
