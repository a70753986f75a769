"""Random-access sources over prepared datasets, with a bounded number of open shards."""

from __future__ import annotations

import collections
import os
import resource
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from aimv2_jax import untrusted
from aimv2_jax.data.dataset_info import DATASET_FILE, FORMAT_VERSION, OLDEST_FORMAT, DatasetInfo
from aimv2_jax.data.records import BadRecord
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.storage.retries import PATIENCE_S, retry

MAX_OPEN_SHARDS = 128  # Limit for the sources of a run; an open shard of 1 GiB takes about 0.2 MB of memory.
_OPEN_FILES_DIVISOR = 4  # Shards may use a quarter of the process's limit on open files, if that is lower.
_READ_BUFFER_BYTES = 32768  # The value in array_record's own data source.


class Source:
    """A prepared dataset, under its name in the config.

    Shards are opened at the first read. Safe to read from several threads; pickles without its open shards, which
    belong to the process.

    Args:
      name: the name in the config, which also seeds the order of the records.
      path: the folder; `package:` paths are inside the installed package.
      what: the name in error messages; default: the config's data source `name`.
      patience_s: time during which failing storage is retried.
      shards: the open shards, which sources may share; default: its own.

    Raises:
      UserError: if the folder is missing, unprepared, empty, incomplete, unreadable or of a newer format.
      StorageError: if storage fails for longer than `patience_s`.
    """

    def __init__(
        self,
        name: str,
        path: str,
        what: str | None = None,
        patience_s: float = PATIENCE_S,
        shards: OpenShards | None = None,
    ):
        self.name = name
        self._shards = shards or OpenShards()
        self._folder = resolve_path(path)
        self._patience_s = patience_s
        read_info = partial(_read_permitted_info, what or f"config data source {name!r}", path)
        self.info = retry(read_info, self._folder / DATASET_FILE, patience_s)
        self._ends = np.cumsum([shard.records for shard in self.info.shards], dtype=np.int64)

    def __len__(self) -> int:
        return self.info.records

    @property
    def kinds(self) -> dict[str, int]:
        """Number of captions of each kind; a record may have several."""
        return self.info.kinds

    @property
    def mean_bytes(self) -> int:
        """Mean bytes per record."""
        return self.info.bytes // self.info.records

    def read(self, index: int) -> bytes:
        """The bytes of record `index`; failing storage is retried, so a transient failure changes no batch.

        Raises:
          BadRecord: `unreadable_record`, if the shard is damaged at this record.
          StorageError: if storage fails for longer than `patience_s`.
          UserError: if the process lacks permission to read the shard, cannot open one more file, or the shard has
            more records than dataset.json lists. The record itself may be good.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of source {self.name}, which has {len(self)}")
        shard = self._shard_of(index)
        first = int(self._ends[shard]) - self.info.shards[shard].records
        path = self._folder / self.info.shards[shard].file
        read = partial(self._shards.read, path, index - first, self.info.shards[shard].records)
        try:
            return retry(read, path, self._patience_s)
        except (MemoryError, StorageError, UserError):
            raise
        except Exception as error:  # array_record raises RuntimeError, ValueError and others for damaged shards.
            raise BadRecord("unreadable_record") from error

    def describe(self, index: int) -> str:
        """The record's number, source and shard, for messages."""
        return f"record {index} of {self.name} ({self.info.shards[self._shard_of(index)].file})"

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def open_datasets(
    paths: Mapping[str, str], patience_s: float = PATIENCE_S, shards: OpenShards | None = None
) -> dict[str, Source]:
    """Opens the datasets of a config by name, in its order; they share the open shards. Raises as `Source` does."""
    shards = shards or OpenShards()
    return {name: Source(name, path, patience_s=patience_s, shards=shards) for name, path in paths.items()}


class OpenShards:
    """LRU cache of open shards; different shards open concurrently. Pickles as an empty one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[Path, Future[Any]] = collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenShards, ()

    def read(self, path: Path, index: int, expected: int) -> bytes:
        """Record `index` of the shard.

        Raises:
          UserError: if the shard has more than the `expected` records, which training would never see. One with fewer
            is damaged (an unreadable shard opens as an empty one): its reads fail by themselves.
        """
        try:
            reader = self._reader(path)
            if reader.num_records() > expected:
                what = f"a shard holds {reader.num_records():,} records, and {DATASET_FILE} says {expected:,}"
                raise UserError(what, str(path), "Copy the whole dataset again, or prepare it again")
            [data] = reader.read([index])
        except Exception:
            with self._lock:  # A reader that has failed once may keep failing after the cause is gone.
                self._readers.pop(path, None)
            raise
        return data

    def _reader(self, path: Path) -> Any:
        """The open shard. The first caller opens it; later callers of the same shard wait, those of others do not."""
        with self._lock:
            reader = self._readers.get(path)
            must_open = reader is None
            if reader is None:
                reader = self._readers[path] = Future()
                while len(self._readers) > _max_open_shards():
                    # Dropped, not closed: another thread may be reading from it, and its last reference closes it.
                    self._readers.popitem(last=False)
            else:
                self._readers.move_to_end(path)
        if must_open:
            try:
                reader.set_result(_open(path))
            except BaseException as error:
                reader.set_exception(error)
        return reader.result()


def _max_open_shards() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if files < 0 else max(1, min(MAX_OPEN_SHARDS, files // _OPEN_FILES_DIVISOR))


def _open(path: Path) -> Any:
    return ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=_READ_BUFFER_BYTES)


def _read_permitted_info(what: str, path: str) -> DatasetInfo:
    try:
        return _read_info(what, path)
    except PermissionError as error:  # Not retried at the start: waiting does not grant permissions.
        refused = error.filename or path
        raise UserError(f"{what}: permission denied", refused, "Grant yourself read permission") from error


def _read_info(what: str, path: str) -> DatasetInfo:
    folder = resolve_path(path)
    if not folder.is_dir():
        raise UserError(f"{what}: no such folder", path, "Give the folder of a prepared dataset")
    if not os.listdir(folder):
        raise UserError(f"{what}: the folder is empty", path, "Prepare the dataset first")
    file = folder / DATASET_FILE
    if not file.is_file():
        raise UserError(
            f"{what}: the folder has no {DATASET_FILE}",
            path,
            "Prepare it first; if preparation was interrupted, run it again",
        )
    try:
        text = untrusted.read_file(file, untrusted.MAX_JSON_BYTES)
        version = untrusted.as_int(untrusted.parse_json_object(text)["format_version"], 0, 1 << 31)
        if version > FORMAT_VERSION:  # Checked first: the rest of the file may have another structure.
            raise UserError(
                f"{what}: its format is newer than this program's {FORMAT_VERSION}", version, "Update aimv2_jax"
            )
        if version < OLDEST_FORMAT:
            raise UserError(
                f"{what}: its format is older than this program reads", version, "Prepare the dataset again"
            )
        info = DatasetInfo.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{what}: {DATASET_FILE} cannot be read", path, "Prepare the dataset again") from error
    counts = [shard.records for shard in info.shards]
    if sum(counts) != info.records:
        raise UserError(
            f"{what}: {DATASET_FILE} counts {info.records} records, and {sum(counts)} in its shards",
            path,
            "Prepare the dataset again",
        )
    if not info.records:
        raise UserError(f"{what}: the dataset has no records", path, "Prepare it from inputs with usable pairs")
    missing = sorted({shard.file for shard in info.shards} - set(os.listdir(folder)))
    if missing:
        raise UserError(f"{what}: {len(missing)} of its shards are missing", missing[0], f"Copy them to {path}")
    return info
