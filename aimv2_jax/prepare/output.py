"""Output folder of a preparation, local or in a bucket; files appear in it atomically.

During the work it also holds the folder `.parts`: the command, the tasks, the results of finished tasks, and shards
that are still being written. `.parts` is removed once `dataset.json` is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from aimv2_jax import version
from aimv2_jax.data.dataset_info import DATASET_FILE, FORMAT_VERSION, DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.record_index import write_index
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.storage.bucket import open_folder
from aimv2_jax.storage.files import (
    atomic_move,
    atomic_write,
    exists,
    is_remote,
    is_temporary,
    list_names,
    list_objects,
    read_bytes,
    remove,
)
from aimv2_jax.storage.locks import lock_folder
from aimv2_jax.untrusted import parse_json_object

RESUME_HINT = "then run the same command with --resume to keep finished work"

_WORK = ".parts"
_COMMAND, _TASKS, _LOCK = "command.json", "tasks.jsonl", "lock"
_READ_BYTES = 1 << 20
_REMEDIES = {
    errno.EACCES: "Give yourself permission to list, read and write there",
    errno.ENOENT: "Create it first, or give another folder",
}
_MAX_READERS = 32  # Threads that read the results of finished tasks: a bucket takes 50 ms to answer.


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Shards and statistics of a finished task.

    `marks` holds each shard's modification time (ns) and the crc32 of its bytes. Shards in a bucket have no marks,
    because an object there cannot be changed in part.
    """

    shards: tuple[Shard, ...]
    stats: DatasetStats
    marks: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> str:
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return json.dumps({"shards": shards, "stats": self.stats.to_tree(), "marks": self.marks})

    @classmethod
    def from_json(cls, text: bytes) -> TaskResult:
        """Parses a result; raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for damaged text."""
        tree = parse_json_object(text)
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        return cls(shards, DatasetStats.from_tree(tree["stats"]), tuple((time, crc32) for time, crc32 in tree["marks"]))


class OutputFolder:
    """The output folder `path`, given by `flag`, and the state of the work in it.

    Its methods raise `OSError` if the disk or the bucket refuses; `errors` converts that.
    """

    def __init__(self, path: str, flag: str = "--output"):
        self.name = path
        self._flag = flag
        self.is_local = not is_remote(path)
        self._folder = path.rstrip("/") if is_remote(path) else os.path.expanduser(path)
        self._work = self._path(_WORK)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Converts errors of the folder's storage inside.

        Raises:
          StorageError: if a bucket failed, and may work later.
          UserError: for every other refusal of a disk or a bucket.
        """
        try:
            yield
        except OSError as error:
            reason, where = error.strerror or str(error), error.filename or self.name
            if is_temporary(error):
                message = f"{self._flag} cannot be used: {reason}: {where}; --resume keeps finished work"
                raise StorageError(message) from error
            remedy = f"{_REMEDIES.get(error.errno, 'Free some space there or fix the cause')}, {RESUME_HINT}"
            raise UserError(f"{self._flag} cannot be used: {reason}", where, remedy) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against a second run. A bucket has no locks; there a second run is refused by `begin`."""
        if not self.is_local:
            yield
            return
        try:
            os.makedirs(self._work, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # A broken link, or a folder such as /proc.
            raise UserError(f"{self._flag} cannot be created", self.name, "Give another folder") from error
        with lock_folder(Path(self._work, _LOCK), self._flag, self.name):
            yield

    def check_free(self, resume: bool) -> None:
        """Raises `UserError` unless the folder is empty, or holds unfinished work and `resume` is set."""
        if self.is_local and os.path.isfile(self._folder):
            raise UserError(f"{self._flag} is a file", self.name, "Give a folder")
        names = set(list_names(self._folder))
        if DATASET_FILE in names:
            if resume:
                return  # `begin` compares the command with the finished dataset's.
            raise self._exists_error()
        if names - {_WORK} and not self._has_begun():
            remedy = "Give a folder that is empty or does not exist"
            raise UserError(f"{self._flag} contains other files", self.name, remedy)
        if self._has_begun() and not resume:
            with self.locked():  # A folder in use must not be removed, so that error comes first.
                pass
            remedy = "Give --resume to continue it, or remove the folder"
            raise UserError(f"{self._flag} contains an unfinished dataset", self.name, remedy)

    def begin(
        self, command: Mapping[str, Any], tasks: Sequence[Task], resume: bool, source: str = "--input"
    ) -> DatasetInfo | None:
        """Prepares the folder for `tasks`, or returns the dataset if the same `command` has already finished it.

        Args:
          command: all values that the dataset depends on, by flag.
          source: the flag that names the input.

        Raises:
          UserError: if the folder holds another dataset, or the work of another command.
        """
        if exists(self._path(DATASET_FILE)):
            self.clear()  # `locked` has created the work folder.
            return self._finished_dataset(command, resume)
        task_lines = "".join(task.to_json() + "\n" for task in tasks)
        program = f"aimv2_jax {version.__version__}, format {FORMAT_VERSION}"
        command = {**command, "plan": hashlib.sha256(task_lines.encode()).hexdigest(), "program": program}
        if not self._has_begun():
            if self.is_local:
                os.makedirs(self._work, exist_ok=True)
            self.write_text(f"{_WORK}/{_TASKS}", task_lines)
            self.write_text(f"{_WORK}/{_COMMAND}", json.dumps(command, indent=1))
            return None
        self.check_free(resume)
        try:
            earlier = parse_json_object(read_bytes(self._path(f"{_WORK}/{_COMMAND}")))
        except ValueError as error:
            remedy = "Remove the folder and start again"
            raise UserError(f"{self._flag}: {_WORK}/{_COMMAND} cannot be read", self.name, remedy) from error
        for name, value in command.items():
            if earlier.get(name) == value:
                continue
            remedy = "Run the command that began it, or remove the folder and start again"
            if name in ("input", "plan", "converted"):
                what = f"{source} finds other files than when this work began"
                raise UserError(what, command.get("input", value), remedy)
            if name == "program":
                raise UserError(f"the program is not {earlier.get(name)}, with which this work began", value, remedy)
            raise UserError(f"--{name} is not {earlier.get(name)!r}, with which this work began", value, remedy)
        self.write_text(f"{_WORK}/{_TASKS}", task_lines)  # Unchanged, unless the file was edited.
        for name in list_names(self._work):
            if name.endswith((".part", ".error")):  # Left by earlier runs.
                remove(self._path(f"{_WORK}/{name}"))
        return None

    def _has_begun(self) -> bool:
        return exists(self._path(f"{_WORK}/{_COMMAND}"))

    def _finished_dataset(self, command: Mapping[str, Any], resume: bool) -> DatasetInfo:
        if resume:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                info = DatasetInfo.from_json(read_bytes(self._path(DATASET_FILE)))
                if info.made == json.loads(json.dumps(command)):
                    return info
        raise self._exists_error()

    def _exists_error(self) -> UserError:
        remedy = "Remove it first, or give another folder"
        return UserError(f"{self._flag} already contains a dataset", self.name, remedy)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder for shards that are being written; for a bucket, a temporary one, removed at the end."""
        if self.is_local:
            yield Path(self._work)
            return
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            yield Path(folder)

    def add_file(self, part: Path, name: str) -> None:
        """Moves a finished local file into the folder."""
        atomic_move(part, Path(self._path(name)) if self.is_local else self._path(name))

    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 file in the folder."""
        atomic_write(self._path(name), text.encode())

    def tasks(self) -> Iterator[Task]:
        """Yields the tasks that were given to `begin`."""
        for line in read_bytes(self._path(f"{_WORK}/{_TASKS}")).decode().splitlines():
            yield Task.from_json(line)

    def finish_task(self, task: Task, result: TaskResult) -> None:
        """Writes the result of a finished task."""
        if self.is_local:
            paths = [Path(self._path(shard.file)) for shard in result.shards]
            marks = tuple((path.stat().st_mtime_ns, _crc32(path)) for path in paths)
            result = dataclasses.replace(result, marks=marks)
        self.write_text(f"{_WORK}/{task.number:05d}.json", result.to_json())

    def fail_task(self, task: Task, error: UserError | StorageError) -> None:
        """Writes an error to a file, for runners that cannot propagate exceptions."""
        fields = [error.what, str(error.value), error.remedy] if isinstance(error, UserError) else [str(error)]
        self.write_text(f"{_WORK}/{task.number:05d}.error", json.dumps(fields))

    def failure(self) -> UserError | StorageError | None:
        """The first error of `fail_task` whose task has not succeeded on a retry, or None."""
        names = list_names(self._work)
        for name in names:
            if name.endswith(".error") and name.replace(".error", ".json") not in names:
                fields = json.loads(read_bytes(f"{self._work}/{name}"))
                return UserError(*fields) if len(fields) > 1 else StorageError(*fields)
        return None

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult | None]:
        """Yields the result of each of `tasks`, None if it is unfinished or its files have changed."""
        sizes = self._sizes()
        with ThreadPoolExecutor(1 if self.is_local else _MAX_READERS) as threads:
            yield from threads.map(partial(self._result, sizes), tasks)

    def _sizes(self) -> dict[str, int]:
        """Bytes of the files in the folder and in the work folder, by their path."""
        if not self.is_local:
            return list_objects(self._folder)
        sizes = open_folder(self._folder).sizes()
        return sizes | {f"{_WORK}/{name}": size for name, size in open_folder(self._work).sizes().items()}

    def _result(self, sizes: Mapping[str, int], task: Task) -> TaskResult | None:
        name = f"{_WORK}/{task.number:05d}.json"
        if name not in sizes:
            return None
        try:
            result = TaskResult.from_json(read_bytes(self._path(name)))
        except (ValueError, KeyError, TypeError, AttributeError):  # The file is damaged.
            return None
        if any(sizes.get(shard.file) != shard.bytes for shard in result.shards):
            return None
        if self.is_local:
            if len(result.marks) != len(result.shards):
                return None
            for shard, (time, crc32) in zip(result.shards, result.marks):
                path = Path(self._path(shard.file))
                # Only files with a changed modification time are read.
                if path.stat().st_mtime_ns != time and _crc32(path) != crc32:
                    return None
        return result

    def add_index(self, shards: Sequence[Shard]) -> int:
        """Writes the index of the finished `shards`; returns its CRC-32."""
        try:
            with self.scratch() as scratch:
                return write_index(self._folder, shards, scratch, self.add_file)
        except ValueError as error:
            remedy = "Remove that file and run the same command with --resume"
            raise UserError(f"{self._flag} has a damaged shard ({error})", self.name, remedy) from error

    def finish(self, info: DatasetInfo) -> None:
        """Writes `dataset.json`, which completes the dataset, and removes the work folder."""
        self.write_text(DATASET_FILE, info.to_json())
        self.clear()

    def clear(self) -> None:
        """Removes the work folder."""
        remove(self._work)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            value = zlib.crc32(data, value)
    return value
