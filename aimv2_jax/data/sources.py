"""Sources: prepared data sets, read record by record at any index, with few shards open at a time."""

from __future__ import annotations

import collections
import os
import resource
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from aimv2_jax import untrusted
from aimv2_jax.data.datasets import DATASET_FILE, FORMAT_VERSION, OLDEST_FORMAT, DatasetInfo
from aimv2_jax.data.locations import locate
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.storage import PATIENCE_S, retry
from aimv2_jax.errors import StorageError, UserError

MAX_OPEN_SHARDS = 128  # Of all sources of a process; one of 1 GiB takes about 0.2 MB of memory.
_SHARE_OF_FILES = 4  # A quarter of the files that the process may open, where that is less.
_READ_BUFFER_BYTES = 32768  # What array_record's own data source uses.


class Source:
    """A prepared data set under the name that the config gives it.

    Opens no shard before its first read. Safe to read from several threads; pickles without its open shards, which
    belong to the process.

    Args:
      name: the config's name, which also seeds the order of its records.
      path: the folder; `package:` paths lie inside the installed package.
      what: what errors call it; without one, the config's data source of that name.
      patience_s: time for which storage that fails is tried again.

    Raises:
      UserError: if the folder is missing, not prepared, empty, incomplete or of a newer format, or may not be read.
      StorageError: if storage fails for longer than `patience_s`.
    """

    def __init__(self, name: str, path: str, what: str | None = None, patience_s: float = PATIENCE_S):
        self.name = name
        self._folder, self._patience_s = locate(path), patience_s
        read_info = partial(_read_permitted_info, what or f"config data source {name!r}", path)
        self.info = retry(read_info, self._folder / DATASET_FILE, patience_s)
        self._ends = np.cumsum([shard.records for shard in self.info.shards], dtype=np.int64)

    def __len__(self) -> int:
        return self.info.records

    @property
    def kinds(self) -> dict[str, int]:
        """How many captions of each kind there are; a record may have several."""
        return self.info.kinds

    @property
    def mean_bytes(self) -> int:
        """Of a record."""
        return self.info.bytes // self.info.records

    def read(self, index: int) -> bytes:
        """The bytes of record `index`; storage that fails is tried again, so that a passing failure changes nothing.

        Raises:
          BadRecord: `unreadable_record`, if the shard is damaged there.
          StorageError: if storage fails for longer than `patience_s`.
          UserError: if the process may not read the shard, cannot open one more file, or the shard holds more records
            than dataset.json says: no fault of the record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of source {self.name}, which has {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard]) - self.info.shards[shard].records
        path = self._folder / self.info.shards[shard].file
        try:
            listed = self.info.shards[shard].records
            return retry(partial(_read_record, path, index - first, listed), path, self._patience_s)
        except (MemoryError, StorageError, UserError):
            raise
        except Exception as error:  # array_record raises RuntimeError, ValueError and others for damaged shards.
            raise BadRecord("unreadable_record") from error


def _read_record(path: Path, index: int, listed: int) -> bytes:
    try:
        reader = _OPEN.reader(path)
        _check_count(path, reader.num_records(), listed)
        [data] = reader.read([index])
    except Exception:
        _OPEN.drop(path)  # A reader that has failed once may go on failing where nothing is wrong.
        raise
    return data


def _check_count(path: Path, held: int, listed: int) -> None:
    """Raises `UserError` if a shard holds records that dataset.json does not count, which would never be seen.

    One that holds fewer is damaged (an unreadable one opens as an empty one): its reads fail by themselves.
    """
    if held > listed:
        what = f"a shard holds {held:,} records, and {DATASET_FILE} says {listed:,}"
        raise UserError(what, str(path), "Copy the data set again as a whole, or prepare it again")


class _OpenShards:
    """The shards that a process has open: it opens several at once, and lets go of those that were used longest ago."""

    def __init__(self):
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[Path, Future[Any]] = collections.OrderedDict()

    def reader(self, path: Path) -> Any:
        """The open shard; whoever asks first opens it, others of the same shard wait, others of other shards do not."""
        with self._lock:
            reader = self._readers.get(path)
            opens = reader is None
            if reader is None:
                reader = self._readers[path] = Future()
                while len(self._readers) > _most_open_shards():
                    # Dropped, not closed: another thread may be reading from it, and its last reference closes it.
                    self._readers.popitem(last=False)
            else:
                self._readers.move_to_end(path)
        if opens:
            try:
                reader.set_result(_open(path))
            except BaseException as error:
                reader.set_exception(error)
        return reader.result()

    def drop(self, path: Path) -> None:
        """The next read of the shard opens it anew."""
        with self._lock:
            self._readers.pop(path, None)


_OPEN = _OpenShards()  # One for all sources: what is bounded, open files, is the process' too.


def _most_open_shards() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if files < 0 else max(1, min(MAX_OPEN_SHARDS, files // _SHARE_OF_FILES))


def _open(path: Path) -> Any:
    return ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=_READ_BUFFER_BYTES)


def _read_permitted_info(what: str, path: str) -> DatasetInfo:
    try:
        return _read_info(what, path)
    except PermissionError as error:  # At the start nobody waits for a right that was never there.
        refused = error.filename or path
        raise UserError(f"{what}: it may not be read", refused, "Give yourself the right to it") from error


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
        text = untrusted.read_file(file, untrusted.MAX_JSON_BYTES)
        version = untrusted.as_int(untrusted.parse_json_object(text)["format_version"], 0, 1 << 31)
        if version > FORMAT_VERSION:  # Told first: the rest of it may look quite different.
            raise UserError(
                f"{what}: its format is newer than this program's {FORMAT_VERSION}", version, "Update aimv2_jax"
            )
        if version < OLDEST_FORMAT:
            raise UserError(
                f"{what}: its format is older than this program reads", version, "Prepare the data set again"
            )
        info = DatasetInfo.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{what}: {DATASET_FILE} cannot be read", path, "Prepare the data set again") from error
    counts = [shard.records for shard in info.shards]
    if sum(counts) != info.records:
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
