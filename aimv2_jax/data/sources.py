"""Sources: prepared data sets, read record by record at any index, with few shards open at a time."""

from __future__ import annotations

import collections
import json
import os
import threading
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from aimv2_jax.data.datasets import DATASET_FILE, FORMAT_VERSION, OLDEST_FORMAT, DatasetInfo
from aimv2_jax.data.locations import locate
from aimv2_jax.data.records import BadRecord
from aimv2_jax.errors import UserError

MAX_OPEN_SHARDS = 64  # Of each source: ten sources stay far below a soft limit of 1,024 open files.
_READ_BUFFER_BYTES = 32768  # What array_record's own data source uses.


class Source:
    """A prepared data set under the name that the config gives it.

    Opens no shard before its first read. Safe to read from several threads; pickles without its open shards.

    Args:
      name: the config's name, which also seeds the order of its records.
      path: the folder; `package:` paths lie inside the installed package.
      what: what errors call it; without one, the config's data source of that name.

    Raises:
      UserError: if the folder is missing, not prepared, empty, incomplete or of a newer format.
    """

    def __init__(self, name: str, path: str, what: str | None = None):
        self.name = name
        self._folder = locate(path)
        self.info = _read_info(what or f"config data source {name!r}", path)
        self._ends = np.cumsum([shard.records for shard in self.info.shards], dtype=np.int64)
        self._reset()

    def _reset(self) -> None:
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self.info.records

    @property
    def kinds(self) -> dict[str, int]:
        """How many records have a caption of each kind."""
        return self.info.kinds

    def read(self, index: int) -> bytes:
        """The bytes of record `index`; raises `BadRecord("unreadable_record")` if the shard cannot give them."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of source {self.name}, which has {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self.info.shards[shard].records
        try:
            [data] = self._reader(shard).read([index - first])
        except Exception as error:  # array_record raises whatever fits; all of it means these bytes cannot be had.
            raise BadRecord("unreadable_record") from error
        return data

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                path = self._folder / self.info.shards[shard].file
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": _READ_BUFFER_BYTES}
                self._readers[shard] = ArrayRecordReader(str(path), **options)
                if len(self._readers) > MAX_OPEN_SHARDS:
                    # Dropped, not closed: another thread may be reading from it, and its last reference closes it.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return self._readers[shard]


def _read_info(what: str, path: str) -> DatasetInfo:
    folder = locate(path)
    if not folder.is_dir():
        raise UserError(f"{what}: no such folder", path, "Give the folder of a prepared data set")
    if not os.listdir(folder):
        raise UserError(f"{what}: the folder is empty", path, "Prepare the data set first")
    file = folder / DATASET_FILE
    if not file.is_file():
        raise UserError(
            f"{what}: the folder has no {DATASET_FILE}", path, "Prepare it first; if that was interrupted, do it again"
        )
    try:
        text = file.read_text(encoding="utf-8")
        version = int(json.loads(text)["format_version"])
        if version > FORMAT_VERSION:  # Told first: the rest of it may look quite different.
            raise UserError(
                f"{what}: its format is newer than this program's {FORMAT_VERSION}", version, "Update aimv2_jax"
            )
        if version < OLDEST_FORMAT:
            raise UserError(
                f"{what}: its format is older than this program reads", version, "Prepare the data set again"
            )
        info = DatasetInfo.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{what}: {DATASET_FILE} cannot be read", path, "Prepare the data set again") from error
    counts = [shard.records for shard in info.shards]
    if min(counts, default=0) < 0 or sum(counts) != info.records:
        raise UserError(
            f"{what}: {DATASET_FILE} counts {info.records} records, and {sum(counts)} in its shards",
            path,
            "Prepare the data set again",
        )
    if not info.records:
        raise UserError(f"{what}: the data set has no records", path, "Prepare it from inputs with usable pairs")
    missing = sorted({shard.file for shard in info.shards} - set(os.listdir(folder)))
    if missing:
        raise UserError(f"{what}: {len(missing)} of its shards are missing", missing[0], f"Copy them to {path}")
    return info
