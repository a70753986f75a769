"""Random-access sources over prepared datasets, in a local folder or in a bucket: a record is one ranged read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

from aimv2_jax import untrusted
from aimv2_jax.data.bag import SUFFIX
from aimv2_jax.data.dataset_info import DATASET_FILE, FORMAT_VERSION, DatasetInfo
from aimv2_jax.data.record_index import ENTRY_BYTES, INDEX_FILE, RecordIndex
from aimv2_jax.data.records import BadRecord, is_intact
from aimv2_jax.errors import UserError
from aimv2_jax.storage.bucket import ObjectFolder, check_scheme, open_folder, scheme_of
from aimv2_jax.storage.host_cache import CachedFolder, HostCache
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.storage.retries import PATIENCE_S, retry

_NO_CACHE = HostCache()
_KEY_LETTERS = 16  # Hexadecimal digits of a dataset's folder in the cache.

_Result = TypeVar("_Result")


class Source:
    """A prepared dataset, under its name in the config.

    Counts and sizes come from dataset.json, and the place of each record from the dataset's index. Safe to read from
    several threads; pickles.

    Args:
      name: the name in the config, which also seeds the order of the records.
      path: the folder, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; `package:` paths are inside the installed package.
      what: the name in error messages; default: the config's data source `name`.
      patience_s: time during which failing storage is retried.
      cache: where this host keeps the index, and maybe the records, of a dataset in a bucket.

    Raises:
      UserError: if the dataset is missing, unprepared, empty, incomplete, unreadable or of another format.
      StorageError: if storage fails for longer than `patience_s`.
    """

    def __init__(
        self,
        name: str,
        path: str,
        what: str | None = None,
        patience_s: float = PATIENCE_S,
        cache: HostCache = _NO_CACHE,
    ):
        self.name = name
        self._what = what or f"config data source {name!r}"
        check_scheme(path, self._what)
        self._location = path if scheme_of(path) else os.fspath(resolve_path(path))
        self._folder: ObjectFolder = open_folder(self._location)
        self._patience_s = patience_s
        text, sizes = self._at_start(partial(_read_info, self._what, path, self._location, self._folder), DATASET_FILE)
        self.info = _parse(self._what, path, text)
        _check_files(self._what, path, self.info, sizes)
        self._ends = np.cumsum([shard.records for shard in self.info.shards], dtype=np.int64)
        if scheme_of(path):
            self._use_cache(cache, key=hashlib.sha256(text).hexdigest()[:_KEY_LETTERS])
        else:
            self._index = self._at_start(partial(RecordIndex, resolve_path(path) / INDEX_FILE), INDEX_FILE)

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

    def read(self, index: int, patience_s: float | None = None) -> bytes:
        """The bytes of record `index`; failing storage is retried, so a transient failure changes no batch.

        Args:
          index: the record.
          patience_s: time during which failing storage is retried; default: the source's.

        Raises:
          BadRecord: `unreadable_record`, if the index is damaged at this record.
          StorageError: if storage fails for longer than `patience_s`.
          UserError: if this process may not read the shard, cannot open one more file, or the shard has vanished or
            become shorter. The record itself may be good.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of source {self.name}, which has {len(self)}")
        shard = self._shard_of(index)
        first = int(self._ends[shard]) - self.info.shards[shard].records
        file, num_bytes = self.info.shards[shard].file, self.info.shards[shard].bytes

        def read() -> bytes:
            start, end = self._index.span(index, index == first)
            if not start < end <= num_bytes:
                raise BadRecord("unreadable_record")
            return self._folder.read(file, start, end)

        path, patience_s = f"{self._location}/{file}", self._patience_s if patience_s is None else patience_s
        data = retry(read, path, patience_s)
        if scheme_of(path) and not is_intact(data):  # Maybe damaged on its way only.
            data = retry(read, path, patience_s)
        return data

    def describe(self, index: int) -> str:
        """The record's number, source and shard, for messages."""
        return f"record {index} of {self.name} ({self.info.shards[self._shard_of(index)].file})"

    def _shard_of(self, index: int) -> int:
        return int(self._ends.searchsorted(index, side="right"))

    def _use_cache(self, cache: HostCache, key: str) -> None:
        num_bytes = ENTRY_BYTES * len(self)
        url, crc32 = self._location, self.info.index_crc32
        file = cache.copy_once(key, self._folder, url, INDEX_FILE, num_bytes, crc32, self._patience_s)
        self._index = RecordIndex(file)
        if cache.max_bytes:
            cache.check_room(key)
            self._folder = CachedFolder(self._folder, cache.path(key), cache.max_bytes, is_intact)

    def _at_start(self, call: Callable[[], _Result], name: str) -> _Result:
        """The result of `call`, retried. On a disk a missing right is an error at once: waiting does not grant it."""

        def permitted() -> _Result:
            try:
                return call()
            except PermissionError as error:
                if scheme_of(self._location):
                    raise
                refused = error.filename or self._location
                raise UserError(
                    f"{self._what}: permission denied", refused, "Grant yourself read permission"
                ) from error

        return retry(permitted, f"{self._location}/{name}", self._patience_s)


def open_datasets(
    paths: Mapping[str, str], patience_s: float = PATIENCE_S, cache: HostCache = _NO_CACHE
) -> dict[str, Source]:
    """Opens the datasets of a config by name, in its order. Raises as `Source` does."""
    return {name: Source(name, path, patience_s=patience_s, cache=cache) for name, path in paths.items()}


def _read_info(what: str, path: str, location: str, folder: ObjectFolder) -> tuple[bytes, dict[str, int]]:
    """The bytes of dataset.json, and the sizes of all files of the folder by name."""
    try:
        sizes = folder.sizes()
    except FileNotFoundError:  # There is no such bucket.
        sizes = {}
    if DATASET_FILE in sizes:
        if sizes[DATASET_FILE] > untrusted.MAX_JSON_BYTES:
            raise UserError(f"{what}: {DATASET_FILE} cannot be read", path, "Prepare the dataset again")
        return folder.read_all(DATASET_FILE), sizes
    if sizes:
        remedy = "Prepare it first; if preparation was interrupted, run it again"
        raise UserError(f"{what}: the folder has no {DATASET_FILE}", path, remedy)
    if scheme_of(path):
        remedy = "Check the name of the bucket and of the folder, or prepare the dataset first"
        raise UserError(f"{what}: no such bucket, or nothing in that folder of it", path, remedy)
    if os.path.isdir(location):
        raise UserError(f"{what}: the folder is empty", path, "Prepare the dataset first")
    raise UserError(f"{what}: no such folder", path, "Give the folder of a prepared dataset")


def _parse(what: str, path: str, text: bytes) -> DatasetInfo:
    try:
        version = untrusted.as_int(untrusted.parse_json_object(text)["format_version"], 0, 1 << 31)
        if version > FORMAT_VERSION:  # Checked first: the rest of the file may have another structure.
            raise UserError(
                f"{what}: its format is newer than this program's {FORMAT_VERSION}", version, "Update aimv2_jax"
            )
        if version < FORMAT_VERSION:
            remedy = f"Convert it: python -m aimv2_jax.prepare.convert {path} NEW_FOLDER"
            raise UserError(f"{what}: its format is older than this program's {FORMAT_VERSION}", version, remedy)
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
    return info


def _check_files(what: str, path: str, info: DatasetInfo, sizes: Mapping[str, int]) -> None:
    """Raises `UserError` unless all files are there with their sizes."""
    old = sorted(shard.file for shard in info.shards if not shard.file.endswith(SUFFIX))
    if old:
        remedy = f"Copy the whole dataset again, or convert it: python -m aimv2_jax.prepare.convert {path} NEW_FOLDER"
        raise UserError(f"{what}: {len(old)} of its shards are not {SUFFIX} files", old[0], remedy)
    expected = {shard.file: shard.bytes for shard in info.shards}
    expected[INDEX_FILE] = ENTRY_BYTES * info.records
    missing = sorted(expected.keys() - sizes.keys())
    if missing:
        raise UserError(f"{what}: {len(missing)} of its files are missing", missing[0], f"Copy them to {path}")
    for name, size in expected.items():
        if sizes[name] != size:
            what = f"{what}: a file has {sizes[name]:,} bytes, and {DATASET_FILE} says {size:,}"
            raise UserError(what, f"{path}/{name}", "Copy the whole dataset again, or prepare it again")
