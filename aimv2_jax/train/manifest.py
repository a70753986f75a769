"""The manifest of a saved step: its files with their sizes and hashes, and what it is; written when all of them are.

`manifest.json` lies in the step's folder and holds a hash of itself, too: no byte of a step can change unnoticed.
Knows nothing of what the files mean.
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

from aimv2_jax.files import is_made_by_system, is_remote, read_whole
from aimv2_jax.untrusted import open_regular, parse_json_object

NAME = "manifest.json"
MISSING, EXTRA, OTHER_CONTENTS, IRREGULAR = "missing", "extra", "other contents", "not a regular file"
_MAX_BYTES = 256 << 20  # Of a manifest: 100 bytes for each file.
_CHUNK = 2**20  # Bytes read at a time.
_THREADS = 4  # Hashing releases Python's lock.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # File systems on which folders, or files open to read, cannot be synced.


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file is known by: its bytes' number and SHA-256, which processors compute faster than BLAKE2."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A file that isn't as the manifest says, by its path in the step's folder; and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step is, as JSON, and its files by their path in its folder; the manifest itself is not among them."""

    about: Mapping[str, Any]
    files: Mapping[str, Entry]

    def to_bytes(self) -> bytes:
        files = {name: f"{entry.size} {entry.sha256}" for name, entry in sorted(self.files.items())}
        return _signed({**self.about, "files": files})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises `ValueError` unless `data` is, to the last byte, what `to_bytes` gave."""
        try:
            tree = parse_json_object(data)
            del tree["digest"]
            if _signed(tree) != data:
                raise ValueError(OTHER_CONTENTS)
            words = {name: entry.split() for name, entry in tree.pop("files").items()}
            files = {name: Entry(int(size), sha256) for name, (size, sha256) in words.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(OTHER_CONTENTS if data else "empty") from error
        return cls(tree, files)

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(entry.size for entry in self.files.values())


def _signed(tree: Mapping[str, Any]) -> bytes:
    """The tree as JSON, with a digest of that."""
    plain = json.dumps(tree, indent=1)
    return (json.dumps({**tree, "digest": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n").encode()


def read(folder: epath.Path) -> Manifest | None:
    """The manifest in `folder`, or None where there is none; raises `ValueError` when it is damaged."""
    try:
        data = read_whole(folder / NAME, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(_unreadable(error)) from error
    return Manifest.from_bytes(data)


def write(folder: epath.Path, about: Mapping[str, Any]) -> Manifest:
    """Makes the manifest of the files that are in `folder`; all of them are then safe from a crash of the machine.

    A step's files are on the disk for good before it takes the place of older ones, which are deleted: each is synced.
    """
    names = [(name, path) for name, path in list_files(folder).items() if name != NAME]
    entries = _in_threads(lambda item: hash_file(item[1], sync=True), names)
    manifest = Manifest(about, {name: entry for (name, _), entry in zip(names, entries)})
    (folder / NAME).write_bytes(manifest.to_bytes())
    if not is_remote(folder):
        with open(folder / NAME, "rb") as file:
            os.fsync(file.fileno())
        for place, _, _ in os.walk(folder):
            sync_folder(place)
    return manifest


def compare(folder: epath.Path, manifest: Manifest, progress: Callable[[int], None] | None = None) -> list[Wrong]:
    """The files of `folder` that are not as the manifest says, by name.

    Args:
      folder: of a step.
      manifest: as `read` gave it.
      progress: is told the number of bytes that were read since it was told before.
    """
    there = list_files(folder)
    there.pop(NAME, None)
    extra = [Wrong(name, EXTRA) for name in there.keys() - manifest.files.keys()]

    def check(item: tuple[str, Entry]) -> Wrong | None:
        name, expected = item
        if name not in there:
            return Wrong(name, MISSING)
        what = check_file(there[name], expected, progress)
        return None if what is None else Wrong(name, what)

    wanted = [item for item in manifest.files.items() if not any(map(is_made_by_system, item[0].split("/")))]
    found = _in_threads(check, wanted)
    return sorted([*filter(None, found), *extra], key=lambda wrong: wrong.file)


def check_file(path: epath.Path, expected: Entry, progress: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with a file, or None."""
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
    """What is wrong with the bytes of a small file, or None."""
    if len(data) != expected.size:
        return f"size {len(data):,} instead of {expected.size:,}"
    return None if hashlib.sha256(data).hexdigest() == expected.sha256 else OTHER_CONTENTS


def hash_file(path: epath.Path, progress: Callable[[int], None] | None = None, sync: bool = False) -> Entry:
    """Size and hash of a file; `sync` also sees to it that the file survives a crash, where there is a disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") if is_remote(path) else open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
        if sync and not is_remote(path):
            _sync(file.fileno())
    return Entry(size, digest.hexdigest())


def list_files(folder: epath.Path) -> dict[str, epath.Path]:
    """All files below `folder` by their path in it; links are files, wherever they lead.

    Those that file systems and desktops make by themselves come and go, and are left out.
    """
    found = {}
    for path in folder.iterdir():
        if is_made_by_system(path.name):
            continue
        if path.is_dir() and not os.path.islink(path):
            found |= {f"{path.name}/{name}": file for name, file in list_files(path).items()}
        else:
            found[path.name] = path
    return found


def sync_folder(folder: str | os.PathLike) -> None:
    """Sees to it that the names in a folder of a disk survive a crash of the machine."""
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
    """What is wrong with a file that the disk cannot read; raises `error` where it isn't the disk's fault."""
    if error.errno in (errno.EIO, errno.EISDIR, errno.ELOOP):
        return f"cannot be read ({os.strerror(error.errno)})"
    raise error


def _in_threads(work: Callable, items: list) -> list:
    """The results of `work` on all items, in their order."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="hash"))
        stack.callback(pool.shutdown, cancel_futures=True)  # After an error nothing more is begun.
        return list(pool.map(work, items))
