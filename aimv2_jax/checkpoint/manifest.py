"""Manifest of a saved step: a header, and the size and hash of every file; written after all other files.

`manifest.json` is in the step's folder and also holds a hash of itself, so that any changed byte of a step is detected.
This module is independent of what the files contain.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from aimv2_jax.storage.files import is_made_by_system, is_remote, read_bytes
from aimv2_jax.untrusted import open_regular, parse_json_object

NAME = "manifest.json"
MISSING, EXTRA, OTHER_CONTENTS, IRREGULAR = "missing", "extra", "other contents", "not a regular file"
_MAX_MANIFEST_BYTES = 256 << 20  # An entry takes about 100 bytes.
_CHUNK_BYTES = 2**20
_THREADS = 4  # Hashing releases the GIL.
# Errors of file systems on which folders, or files opened for reading, cannot be synced.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Size and SHA-256 of a file; processors compute SHA-256 faster than BLAKE2."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class FileProblem:
    """A file that differs from the manifest, by its path in the step's folder, and how it differs."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """JSON header of a step, and its files by their path in the folder, without the manifest itself."""

    header: Mapping[str, Any]
    files: Mapping[str, Entry]

    def to_bytes(self) -> bytes:
        files = {name: f"{entry.size} {entry.sha256}" for name, entry in sorted(self.files.items())}
        return _signed({**self.header, "files": files})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parses the exact output of `to_bytes`; raises `ValueError` if any byte differs."""
        try:
            tree = parse_json_object(data)
            del tree["digest"]
            if _signed(tree) != data:
                raise ValueError(OTHER_CONTENTS)
            fields = {name: entry.split() for name, entry in tree.pop("files").items()}
            files = {name: Entry(int(size), sha256) for name, (size, sha256) in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(OTHER_CONTENTS if data else "empty") from error
        return cls(tree, files)

    @property
    def num_bytes(self) -> int:
        """Total size of all files."""
        return sum(entry.size for entry in self.files.values())


def _signed(tree: Mapping[str, Any]) -> bytes:
    """The tree as JSON, with a digest of that JSON."""
    unsigned = json.dumps(tree, indent=1)
    return (json.dumps({**tree, "digest": hashlib.sha256(unsigned.encode()).hexdigest()}, indent=1) + "\n").encode()


def read(folder: epath.Path) -> Manifest | None:
    """Reads the manifest in `folder`; None if there is none; raises `ValueError` when it is damaged."""
    try:
        data = read_bytes(folder / NAME, _MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(_unreadable(error)) from error
    return Manifest.from_bytes(data)


def write(folder: epath.Path, header: Mapping[str, Any]) -> Manifest:
    """Syncs all files in `folder` to disk and writes their manifest; the step then survives a crash of the machine.

    Every file is synced here, before older steps are deleted.
    """
    names = [(name, path) for name, path in list_files(folder).items() if name != NAME]
    entries = _in_threads(lambda item: hash_file(item[1], sync=True), names)
    manifest = Manifest(header, {name: entry for (name, _), entry in zip(names, entries)})
    (folder / NAME).write_bytes(manifest.to_bytes())
    if not is_remote(folder):
        with open(folder / NAME, "rb") as file:
            os.fsync(file.fileno())
        for subfolder, _, _ in os.walk(folder):
            sync_folder(subfolder)
    return manifest


def compare(folder: epath.Path, manifest: Manifest, progress: Callable[[int], None] | None = None) -> list[FileProblem]:
    """Returns the files of `folder` that differ from the manifest, sorted by name.

    Args:
      folder: of a step.
      manifest: returned by `read`.
      progress: called with the number of bytes read since its last call.
    """
    existing = list_files(folder)
    existing.pop(NAME, None)
    extra = [FileProblem(name, EXTRA) for name in existing.keys() - manifest.files.keys()]

    def check(item: tuple[str, Entry]) -> FileProblem | None:
        name, expected = item
        if name not in existing:
            return FileProblem(name, MISSING)
        what = check_file(existing[name], expected, progress)
        return None if what is None else FileProblem(name, what)

    entries = [item for item in manifest.files.items() if not any(map(is_made_by_system, item[0].split("/")))]
    problems = _in_threads(check, entries)
    return sorted([*filter(None, problems), *extra], key=lambda problem: problem.file)


def check_file(path: epath.Path, expected: Entry, progress: Callable[[int], None] | None = None) -> str | None:
    """How a file differs from its entry, or None."""
    try:
        size = path.stat().length
        if size == expected.size:
            entry = hash_file(path, progress)
            return None if entry == expected else OTHER_CONTENTS
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return _unreadable(error)
    except ValueError:
        return IRREGULAR
    return f"size {size:,} instead of {expected.size:,}"


def check_bytes(data: bytes, expected: Entry) -> str | None:
    """How the bytes of a small file differ from its entry, or None."""
    if len(data) != expected.size:
        return f"size {len(data):,} instead of {expected.size:,}"
    return None if hashlib.sha256(data).hexdigest() == expected.sha256 else OTHER_CONTENTS


def hash_file(path: epath.Path, progress: Callable[[int], None] | None = None, sync: bool = False) -> Entry:
    """Size and hash of a file; `sync` also flushes a local file to disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") if is_remote(path) else open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
        if sync and not is_remote(path):
            _sync(file.fileno())
    return Entry(size, digest.hexdigest())


def list_files(folder: epath.Path) -> dict[str, epath.Path]:
    """All files below `folder` by their relative path; a symbolic link counts as a file, whatever its target.

    Files that file systems and desktops create are left out, since they come and go.
    """
    files = {}
    for path in folder.iterdir():
        if is_made_by_system(path.name):
            continue
        if path.is_dir() and not os.path.islink(path):
            files |= {f"{path.name}/{name}": file for name, file in list_files(path).items()}
        else:
            files[path.name] = path
    return files


def sync_folder(folder: str | os.PathLike) -> None:
    """Flushes the names in a local folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _unreadable(error: OSError) -> str:
    """Message for a file that the disk cannot read; raises `error` if the disk is not the cause."""
    if error.errno in (errno.EIO, errno.EISDIR, errno.ELOOP):
        return f"cannot be read ({os.strerror(error.errno)})"
    raise error


def _in_threads(work: Callable, items: list) -> list:
    """Maps `work` over the items in threads; results are in the order of the items."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="hash"))
        stack.callback(pool.shutdown, cancel_futures=True)  # After an error no further item is started.
        return list(pool.map(work, items))
