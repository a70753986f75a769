"""Index of a dataset: where each record ends in its shard, as one file of uint32, in the order of the records.

It is written with the dataset and kept on each host's disk: a dataset in a bucket has its index copied once a host,
into the cache folder. So a record is one ranged read. Lookups read 8 bytes of the file and map none of it: the pages
stay in the system's page cache, shared by all processes of the host, and no process grows.
"""

from __future__ import annotations

import errno
import os
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from aimv2_jax.data.bag import read_ends
from aimv2_jax.data.shards import MoveFile, Shard
from aimv2_jax.storage.bucket import open_folder
from aimv2_jax.storage.files import part_path, with_retries
from aimv2_jax.storage.ordered import map_in_order

INDEX_FILE = "records.index"
ENTRY_BYTES = 4
_PAIR = struct.Struct("<II")
_ONE = struct.Struct("<I")
# Shards whose ends are read at once. A bucket takes 50 ms to answer; a shard of 4 GiB has about 0.5 MB of ends.
_READERS = 32


class RecordIndex:
    """The open index at a local path. Safe to use from several threads; pickles as its path.

    Raises:
      OSError: if it cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        if hasattr(os, "posix_fadvise"):  # A lookup must not read neighbouring pages as well.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __reduce__(self):
        return RecordIndex, (self._path,)

    def span(self, index: int, is_first: bool) -> tuple[int, int]:
        """Start and end of record `index` of the dataset in its shard, of which it may be the first.

        Raises:
          OSError: if the index cannot be read, or ends before this record.
        """
        if is_first:
            return 0, *_ONE.unpack(self._read(index * ENTRY_BYTES, _ONE.size))
        return _PAIR.unpack(self._read((index - 1) * ENTRY_BYTES, _PAIR.size))

    def _read(self, start: int, length: int) -> bytes:
        try:
            data = os.pread(self._descriptor, length, start)
        except OSError:  # A descriptor of a network disk may stay unusable (ESTALE), so the next call has a new one.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(descriptor, self._descriptor, inheritable=False)  # Atomic, so that other threads may be reading.
            os.close(descriptor)
            raise
        if len(data) < length:
            raise OSError(errno.ENODATA, "the index is shorter", str(self._path))
        return data


def to_entries(ends: np.ndarray) -> bytes:
    """The entries of a shard's records, given their ends (`bag.read_ends`)."""
    return ends.astype("<u4").tobytes()


def write_index(folder: str | os.PathLike, shards: Sequence[Shard], scratch: Path, move: MoveFile) -> int:
    """Writes the index of a dataset whose `shards` are in `folder`, local or in a bucket; returns its CRC-32.

    The ends of a shard are one ranged read, and those of few shards are in memory at a time.

    Args:
      scratch: the local folder in which the index is written.
      move: moves the finished index to its destination.

    Raises:
      ValueError: if a shard is no bag with so many records.
      OSError: if a shard cannot be read, or the index cannot be written.
    """
    part = part_path(scratch / INDEX_FILE)
    crc32 = 0
    try:
        with part.open("wb") as file:
            for entries in _read_entries(folder, shards):
                file.write(entries)
                crc32 = zlib.crc32(entries, crc32)
        move(part, INDEX_FILE)
    finally:
        part.unlink(missing_ok=True)
    return crc32


def find_damage(folder: str | os.PathLike, shards: Sequence[Shard], crc32: int) -> str | None:
    """What is wrong with the index of a dataset; None if it has the ends of its shards, and this CRC-32.

    Raises:
      OSError: if a file cannot be read.
    """
    files, start, found = open_folder(folder), 0, 0
    try:
        for shard, expected in zip(shards, _read_entries(folder, shards)):
            read = partial(files.read, INDEX_FILE, start, start + len(expected))
            entries = with_retries(read, f"{folder}/{INDEX_FILE}")
            if entries != expected:
                return f"has other ends than {shard.file}"
            found = zlib.crc32(entries, found)
            start += len(entries)
    except ValueError as error:
        return str(error)
    return None if found == crc32 else "has another CRC-32 than dataset.json"


def _read_entries(folder: str | os.PathLike, shards: Sequence[Shard]) -> Iterator[bytes]:
    """Yields the entries of each shard in order, as the shards have them; raises as `write_index`."""
    return map_in_order(partial(_shard_entries, os.fspath(folder)), shards, _READERS)


def _shard_entries(folder: str, shard: Shard) -> bytes:
    read = partial(read_ends, open_folder(folder), shard.file, shard.records, shard.bytes)
    return to_entries(with_retries(read, f"{folder}/{shard.file}"))
