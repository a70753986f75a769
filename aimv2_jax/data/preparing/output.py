"""The folder where a data set grows: local, or in a bucket (`gs://`), where files appear whole in both.

Beside the shards it holds `.parts` while the work goes on: the command, the tasks, the counts of those that are
finished, and shards that are still being written. It goes when `dataset.json` has come.
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

import aimv2_jax
from aimv2_jax.data.books import Books
from aimv2_jax.data.datasets import DATASET_FILE, FORMAT_VERSION, DatasetInfo
from aimv2_jax.data.preparing.groups import Task
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote, move_whole, write_whole
from aimv2_jax.locks import claimed
from aimv2_jax.untrusted import parse_json_object

_WORK = ".parts"
_COMMAND, _TASKS, _LOCK = "command.json", "tasks.jsonl", "lock"
_READ_BYTES = 1 << 20
_READERS = 32  # Threads that look after finished tasks: a bucket takes 50 ms to answer.
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished task left: its shards, and its books.

    `marks` are the time of each shard's last change (ns) and the crc32 of its bytes. A bucket's have none: nobody can
    change a part of what lies there.
    """

    shards: tuple[Shard, ...]
    books: Books
    marks: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> str:
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return json.dumps({"shards": shards, "books": self.books.to_tree(), "marks": self.marks})

    @classmethod
    def from_json(cls, text: str) -> Done:
        """Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for text that is damaged."""
        tree = parse_json_object(text)
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        return cls(shards, Books.from_tree(tree["books"]), tuple((time, crc32) for time, crc32 in tree["marks"]))


class BucketError(UserError):
    """A bucket did not do what it was asked to: it may, when it is asked again."""


def _asks_bucket(method: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Wraps a method of `Output`: what a bucket refuses, in TensorFlow's or fsspec's words, is a `BucketError`.

    What a disk refuses stays an OSError.
    """

    @functools.wraps(method)
    def wrapped(self: Output, *args: Any, **kwargs: Any) -> _Answer:
        if self.is_local:
            return method(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            remedy = f"Look after it ({error}), then give the same command with --resume"
            raise BucketError("--output cannot be used", self.name, remedy) from error

    return wrapped


class Output:
    """The output folder `path`, and what is known of the work in it."""

    def __init__(self, path: str):
        self.name = path
        self.is_local = not is_remote(path)
        self._folder = epath.Path(os.path.expanduser(path))
        self._work = self._folder / _WORK

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps a second run out; in a bucket, without locks, that finds the first one's command and is refused."""
        if not self.is_local:
            yield
            return
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # A link to nowhere, or a place such as /proc.
            raise UserError("--output cannot be made there", self.name, "Name another folder") from error
        with claimed(Path(self._work) / _LOCK, "--output", self.name):
            yield

    @_asks_bucket
    def check_free(self, resume: bool) -> None:
        """Raises `UserError` unless the folder is empty, or work in it has begun that `resume` asks to go on with."""
        if not self._folder.exists():
            return
        if not self._folder.is_dir():
            raise UserError("--output is a file", self.name, "Name a folder")
        names = {path.name for path in self._folder.iterdir()}
        if DATASET_FILE in names:
            if resume:
                return  # For `begin` to judge, which knows the command.
            raise self._taken()
        if names - {_WORK} and not self._begun():
            remedy = "Name a folder that is empty or not there yet"
            raise UserError("--output holds something else", self.name, remedy)
        if self._begun() and not resume:
            with self.claimed():  # Who is at work there, is told first: that folder is not to be removed.
                pass
            remedy = "Give --resume to go on with it, or remove the folder"
            raise UserError("--output holds a data set that is not finished", self.name, remedy)

    @_asks_bucket
    def begin(self, command: Mapping[str, Any], tasks: Sequence[Task], resume: bool) -> DatasetInfo | None:
        """Makes the folder ready for `tasks`, or answers the data set that this very `command` has made already.

        Raises:
          UserError: if the folder holds another data set, or the work of another command.
        """
        if (self._folder / DATASET_FILE).exists():
            if self._work.exists():  # Made by the claim.
                self.clear()
            return self._finished(command, resume)
        plan = "".join(task.to_json() + "\n" for task in tasks)
        program = f"aimv2_jax {aimv2_jax.__version__}, format {FORMAT_VERSION}"
        command = {**command, "plan": hashlib.sha256(plan.encode()).hexdigest(), "program": program}
        if not self._begun():
            self._work.mkdir(parents=True, exist_ok=True)
            self.write_text(f"{_WORK}/{_TASKS}", plan)
            self.write_text(f"{_WORK}/{_COMMAND}", json.dumps(command, indent=1))
            return None
        self.check_free(resume)
        try:
            begun = parse_json_object((self._work / _COMMAND).read_text())
        except ValueError as error:
            remedy = "Remove the folder and begin anew"
            raise UserError(f"--output: {_WORK}/{_COMMAND} cannot be read", self.name, remedy) from error
        for name, value in command.items():
            if begun.get(name) == value:
                continue
            remedy = "Give the command that began it, or remove the folder and begin anew"
            if name in ("input", "plan"):
                raise UserError("--input finds other files than when this work began", command["input"], remedy)
            if name == "program":
                raise UserError(f"the program is not {begun.get(name)}, with which this work began", value, remedy)
            raise UserError(f"--{name} is not {begun.get(name)!r}, with which this work began", value, remedy)
        self.write_text(f"{_WORK}/{_TASKS}", plan)  # As it was, unless somebody was at it.
        for path in self._work.iterdir():
            if path.name.endswith((".part", ".error")):  # Of runs that have ended.
                path.unlink(missing_ok=True)
        return None

    def _begun(self) -> bool:
        return (self._work / _COMMAND).exists()

    def _finished(self, command: Mapping[str, Any], resume: bool) -> DatasetInfo:
        if resume:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                info = DatasetInfo.from_json((self._folder / DATASET_FILE).read_text())
                if info.made == json.loads(json.dumps(command)):
                    return info
        raise self._taken()

    def _taken(self) -> UserError:
        remedy = "Remove it first, or write to another folder"
        return UserError("--output holds a data set already", self.name, remedy)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder where shards grow; for a bucket, one of its own that goes with what is left in it."""
        if self.is_local:
            yield Path(self._work)
            return
        with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
            yield Path(folder)

    @_asks_bucket
    def place(self, part: Path, name: str) -> None:
        """Moves a finished local file here."""
        move_whole(part, self._folder / name)

    @_asks_bucket
    def write_text(self, name: str, text: str) -> None:
        """Makes a file of UTF-8 here."""
        write_whole(self._folder / name, text.encode())

    def tasks(self) -> Iterator[Task]:
        """The tasks that `begin` was given."""
        for line in (self._work / _TASKS).read_text().splitlines():
            yield Task.from_json(line)

    def finish_task(self, task: Task, done: Done) -> None:
        if self.is_local:
            paths = [Path(self._folder / shard.file) for shard in done.shards]
            marks = tuple((path.stat().st_mtime_ns, _crc32(path)) for path in paths)
            done = dataclasses.replace(done, marks=marks)
        self.write_text(f"{_WORK}/{task.number:05d}.json", done.to_json())

    def fail_task(self, task: Task, error: UserError) -> None:
        """Notes down what the user can mend, for a runner that can't carry it."""
        self.write_text(f"{_WORK}/{task.number:05d}.error", json.dumps([error.what, str(error.value), error.remedy]))

    @_asks_bucket
    def failure(self) -> UserError | None:
        """The first that was noted down, but by tries that another one made good."""
        for path in sorted(self._work.glob("*.error")):
            if not path.with_suffix(".json").exists():
                return UserError(*json.loads(path.read_text()))
        return None

    def done(self, tasks: Sequence[Task]) -> Iterator[Done | None]:
        """What each of `tasks` left, None where it is not finished or its files are not what they were."""
        with ThreadPoolExecutor(1 if self.is_local else _READERS) as threads:
            yield from threads.map(self._done, tasks)

    @_asks_bucket
    def _done(self, task: Task) -> Done | None:
        file = self._work / f"{task.number:05d}.json"
        if not file.exists():
            return None
        try:
            done = Done.from_json(file.read_text())
        except (ValueError, KeyError, TypeError, AttributeError):  # Damaged.
            return None
        paths = [(self._folder / shard.file, shard.bytes) for shard in done.shards]
        if not all(path.exists() and path.stat().length == size for path, size in paths):
            return None
        if self.is_local:
            if len(done.marks) != len(paths):
                return None
            for (path, _), (time, crc32) in zip(paths, done.marks):  # Read are those that somebody touched.
                if Path(path).stat().st_mtime_ns != time and _crc32(Path(path)) != crc32:
                    return None
        return done

    def finish(self, info: DatasetInfo) -> None:
        """Writes `dataset.json`, by which the folder becomes a data set, and tidies up."""
        self.write_text(DATASET_FILE, info.to_json())
        self.clear()

    @_asks_bucket
    def clear(self) -> None:
        """Removes the work folder."""
        self._work.rmtree()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            value = zlib.crc32(data, value)
    return value
