"""Output folder of a preparation, local or in a bucket (`gs://`); files appear in it atomically.

During the work it also holds the folder `.parts`: the command, the tasks, the results of finished tasks, and shards
that are still being written. `.parts` is removed once `dataset.json` is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from aimv2_jax import version
from aimv2_jax.data.dataset_info import DATASET_FILE, FORMAT_VERSION, DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.storage.files import atomic_move, atomic_write, is_remote
from aimv2_jax.storage.locks import lock_folder
from aimv2_jax.untrusted import parse_json_object

_WORK = ".parts"
_COMMAND, _TASKS, _LOCK = "command.json", "tasks.jsonl", "lock"
_READ_BYTES = 1 << 20
_MAX_READERS = 32  # Threads that read the results of finished tasks: a bucket takes 50 ms to answer.
_Answer = TypeVar("_Answer")


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
    def from_json(cls, text: str) -> TaskResult:
        """Parses a result; raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for damaged text."""
        tree = parse_json_object(text)
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        return cls(shards, DatasetStats.from_tree(tree["stats"]), tuple((time, crc32) for time, crc32 in tree["marks"]))


class BucketError(UserError):
    """Failed request to a bucket; a retry may succeed."""


def _raises_bucket_errors(method: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Wraps a method of `OutputFolder` to raise errors of a bucket, which TensorFlow or fsspec raise, as `BucketError`.

    Errors of a local disk stay OSErrors.
    """

    @functools.wraps(method)
    def wrapped(self: OutputFolder, *args: Any, **kwargs: Any) -> _Answer:
        if self.is_local:
            return method(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            remedy = f"Fix the cause ({error}), then run the same command with --resume"
            raise BucketError("--output cannot be used", self.name, remedy) from error

    return wrapped


class OutputFolder:
    """The output folder `path` and the state of the work in it."""

    def __init__(self, path: str):
        self.name = path
        self.is_local = not is_remote(path)
        self._folder = epath.Path(os.path.expanduser(path))
        self._work = self._folder / _WORK

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against a second run. A bucket has no locks; there a second run is refused by `begin`."""
        if not self.is_local:
            yield
            return
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # A broken link, or a folder such as /proc.
            raise UserError("--output cannot be created", self.name, "Give another folder") from error
        with lock_folder(Path(self._work) / _LOCK, "--output", self.name):
            yield

    @_raises_bucket_errors
    def check_free(self, resume: bool) -> None:
        """Raises `UserError` unless the folder is empty, or holds unfinished work and `resume` is set."""
        if not self._folder.exists():
            return
        if not self._folder.is_dir():
            raise UserError("--output is a file", self.name, "Give a folder")
        names = {path.name for path in self._folder.iterdir()}
        if DATASET_FILE in names:
            if resume:
                return  # `begin` compares the command with the finished dataset's.
            raise self._exists_error()
        if names - {_WORK} and not self._has_begun():
            remedy = "Give a folder that is empty or does not exist"
            raise UserError("--output contains other files", self.name, remedy)
        if self._has_begun() and not resume:
            with self.locked():  # A folder in use must not be removed, so that error comes first.
                pass
            remedy = "Give --resume to continue it, or remove the folder"
            raise UserError("--output contains an unfinished dataset", self.name, remedy)

    @_raises_bucket_errors
    def begin(self, command: Mapping[str, Any], tasks: Sequence[Task], resume: bool) -> DatasetInfo | None:
        """Prepares the folder for `tasks`, or returns the dataset if the same `command` has already finished it.

        Raises:
          UserError: if the folder holds another dataset, or the work of another command.
        """
        if (self._folder / DATASET_FILE).exists():
            if self._work.exists():  # `locked` has created it.
                self.clear()
            return self._finished_dataset(command, resume)
        task_lines = "".join(task.to_json() + "\n" for task in tasks)
        program = f"aimv2_jax {version.__version__}, format {FORMAT_VERSION}"
        command = {**command, "plan": hashlib.sha256(task_lines.encode()).hexdigest(), "program": program}
        if not self._has_begun():
            self._work.mkdir(parents=True, exist_ok=True)
            self.write_text(f"{_WORK}/{_TASKS}", task_lines)
            self.write_text(f"{_WORK}/{_COMMAND}", json.dumps(command, indent=1))
            return None
        self.check_free(resume)
        try:
            earlier = parse_json_object((self._work / _COMMAND).read_text())
        except ValueError as error:
            remedy = "Remove the folder and start again"
            raise UserError(f"--output: {_WORK}/{_COMMAND} cannot be read", self.name, remedy) from error
        for name, value in command.items():
            if earlier.get(name) == value:
                continue
            remedy = "Run the command that began it, or remove the folder and start again"
            if name in ("input", "plan"):
                raise UserError("--input finds other files than when this work began", command["input"], remedy)
            if name == "program":
                raise UserError(f"the program is not {earlier.get(name)}, with which this work began", value, remedy)
            raise UserError(f"--{name} is not {earlier.get(name)!r}, with which this work began", value, remedy)
        self.write_text(f"{_WORK}/{_TASKS}", task_lines)  # Unchanged, unless the file was edited.
        for path in self._work.iterdir():
            if path.name.endswith((".part", ".error")):  # Left by earlier runs.
                path.unlink(missing_ok=True)
        return None

    def _has_begun(self) -> bool:
        return (self._work / _COMMAND).exists()

    def _finished_dataset(self, command: Mapping[str, Any], resume: bool) -> DatasetInfo:
        if resume:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                info = DatasetInfo.from_json((self._folder / DATASET_FILE).read_text())
                if info.made == json.loads(json.dumps(command)):
                    return info
        raise self._exists_error()

    def _exists_error(self) -> UserError:
        remedy = "Remove it first, or give another folder"
        return UserError("--output already contains a dataset", self.name, remedy)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder for shards that are being written; for a bucket, a temporary one, removed at the end."""
        if self.is_local:
            yield Path(self._work)
            return
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            yield Path(folder)

    @_raises_bucket_errors
    def add_file(self, part: Path, name: str) -> None:
        """Moves a finished local file into the folder."""
        atomic_move(part, self._folder / name)

    @_raises_bucket_errors
    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 file in the folder."""
        atomic_write(self._folder / name, text.encode())

    def tasks(self) -> Iterator[Task]:
        """Yields the tasks that were given to `begin`."""
        for line in (self._work / _TASKS).read_text().splitlines():
            yield Task.from_json(line)

    def finish_task(self, task: Task, result: TaskResult) -> None:
        """Writes the result of a finished task."""
        if self.is_local:
            paths = [Path(self._folder / shard.file) for shard in result.shards]
            marks = tuple((path.stat().st_mtime_ns, _crc32(path)) for path in paths)
            result = dataclasses.replace(result, marks=marks)
        self.write_text(f"{_WORK}/{task.number:05d}.json", result.to_json())

    def fail_task(self, task: Task, error: UserError) -> None:
        """Writes a user error to a file, for runners that cannot propagate exceptions."""
        self.write_text(f"{_WORK}/{task.number:05d}.error", json.dumps([error.what, str(error.value), error.remedy]))

    @_raises_bucket_errors
    def failure(self) -> UserError | None:
        """The first user error of `fail_task` whose task has not succeeded on a retry, or None."""
        for path in sorted(self._work.glob("*.error")):
            if not path.with_suffix(".json").exists():
                return UserError(*json.loads(path.read_text()))
        return None

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult | None]:
        """Yields the result of each of `tasks`, None if it is unfinished or its files have changed."""
        with ThreadPoolExecutor(1 if self.is_local else _MAX_READERS) as threads:
            yield from threads.map(self._result, tasks)

    @_raises_bucket_errors
    def _result(self, task: Task) -> TaskResult | None:
        file = self._work / f"{task.number:05d}.json"
        if not file.exists():
            return None
        try:
            result = TaskResult.from_json(file.read_text())
        except (ValueError, KeyError, TypeError, AttributeError):  # The file is damaged.
            return None
        paths = [(self._folder / shard.file, shard.bytes) for shard in result.shards]
        if not all(path.exists() and path.stat().length == size for path, size in paths):
            return None
        if self.is_local:
            if len(result.marks) != len(paths):
                return None
            for (path, _), (time, crc32) in zip(paths, result.marks):
                # Only files with a changed modification time are read.
                if Path(path).stat().st_mtime_ns != time and _crc32(Path(path)) != crc32:
                    return None
        return result

    def finish(self, info: DatasetInfo) -> None:
        """Writes `dataset.json`, which completes the dataset, and removes the work folder."""
        self.write_text(DATASET_FILE, info.to_json())
        self.clear()

    @_raises_bucket_errors
    def clear(self) -> None:
        """Removes the work folder."""
        self._work.rmtree()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            value = zlib.crc32(data, value)
    return value
