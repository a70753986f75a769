"""Shard writer: bag files of about equal size, each written atomically."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from aimv2_jax.data import bag
from aimv2_jax.storage.files import atomic_move, part_path

MoveFile = Callable[[Path, str], None]
"""Moves a finished local file to its destination, under the given name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One bag file of a dataset, as listed in `dataset.json`."""

    file: str
    records: int
    bytes: int


class ShardWriter:
    """Writes records in order to `PREFIX00000.bag`, …; equal records give equal bytes.

    The record that brings a shard to `limit` bytes is its last; the shard is then moved to its destination. No shard
    exceeds `bag.MAX_BYTES`. A shard that an error interrupts is removed. `shards` lists the moved shards.

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
        self._writer: bag.BagWriter | None = None
        self._part: Path | None = None
        self._count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.end_shard()
        finally:
            self._abandon()

    def write(self, record: bytes) -> None:
        """Appends `record` to the open shard, or to a new one.

        Raises:
          OSError: if the system refuses the write, or the move of a full shard; the shard is then lost.
        """
        if self._writer is not None and self._writer.bytes + len(record) > bag.MAX_BYTES:
            self.end_shard()
        if self._writer is None:
            self._part = part_path(self._scratch / self._name())
            self._writer = bag.BagWriter(self._part)
        self._writer.write(record)
        self._count += 1
        if self._writer.bytes >= self._limit:
            self.end_shard()

    def end_shard(self) -> None:
        """Completes the open shard, if there is one, and moves it to its destination."""
        if self._writer is None:
            return
        assert self._part is not None
        self._writer.close()
        self._writer = None
        shard = Shard(self._name(), self._count, self._part.stat().st_size)
        self._move(self._part, shard.file)
        self.shards.append(shard)
        self._part = None
        self._count = 0

    def _name(self) -> str:
        return f"{self._prefix}{len(self.shards):05d}{bag.SUFFIX}"

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def move_into(folder: Path) -> MoveFile:
    """A `MoveFile` that moves files into `folder`, on the same file system."""
    return lambda part, name: atomic_move(part, folder / name)
