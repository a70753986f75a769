"""Bag files: records one after another, then the end of each as a little-endian uint64 (uncompressed bagz).

The format is that of Google DeepMind's bagz, whose library reads these files; nothing but `struct` is needed to write
them and nothing but ranged reads to read them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aimv2_jax.storage.bucket import ObjectFolder

SUFFIX = ".bag"
END_BYTES = 8
MAX_BYTES = (1 << 32) - 1
"""Limit on the records of one file, whose ends are uint32 in a dataset's index (data/record_index.py)."""


class BagWriter:
    """Writes records to a new file; equal records give equal bytes. An interrupted file has no valid ends."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._ends = array.array("Q")
        self.bytes = 0

    def write(self, record: bytes) -> None:
        """Appends a record; raises OSError if the disk refuses it, or the file would become longer than MAX_BYTES."""
        if self.bytes + len(record) > MAX_BYTES:
            raise OSError(errno.EFBIG, f"the records of one shard exceed {MAX_BYTES:,} bytes", self._file.name)
        with self._named_errors():
            self._file.write(record)
        self.bytes += len(record)
        self._ends.append(self.bytes)

    def close(self) -> None:
        """Writes the ends and closes the file."""
        with self._named_errors(), self._file:
            if sys.byteorder == "big":
                self._ends.byteswap()
            self._file.write(self._ends.tobytes())

    def abandon(self) -> None:
        """Closes the file without its ends; a disk that refuses the last records does not matter any more."""
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = self._file.name  # Python omits the name in errors of a full disk.
            raise


def read_ends(folder: ObjectFolder, name: str, records: int, num_bytes: int) -> np.ndarray:
    """The ends of a file's records [records] uint64, given their number and the size of the file.

    Raises:
      ValueError: if they are not those of a bag with so many records.
      OSError: if the file cannot be read, ENODATA if it is shorter.
    """
    start = num_bytes - END_BYTES * records
    if records < 1 or start < 0:
        raise ValueError(f"{name} has no room for the ends of {records:,} records")
    ends = np.frombuffer(folder.read(name, start, num_bytes), "<u8")
    if int(ends[-1]) != start or not (np.diff(ends.astype(np.int64), prepend=0) >= 0).all():
        raise ValueError(f"{name} does not end with the ends of {records:,} records")
    return ends
