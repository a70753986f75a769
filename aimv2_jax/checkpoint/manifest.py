"""Manifest of a saved step: a header and the size of every file; and the hashes of these files, which are added later.

`manifest.json` is written after all other files, and a step exists from then on. Hashing reads everything back, so
`hashes.json` follows in the background: a step that was killed in between has sizes only. Both files are in the step's
folder and hold a hash of themselves, so that any changed byte of a hashed step is detected. This module is independent
of what the files contain.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from etils import epath

from aimv2_jax.storage.bucket import open_folder
from aimv2_jax.storage.files import (
    atomic_write,
    is_made_by_system,
    is_remote,
    list_objects,
    read_bytes,
    remove,
    with_retries,
)
from aimv2_jax.untrusted import open_regular, parse_json_object

NAME = "manifest.json"
HASHES = "hashes.json"
MISSING, EXTRA, OTHER_CONTENTS, IRREGULAR = "missing", "extra", "other contents", "not a regular file"
_MAX_BYTES = 256 << 20  # Either file may have so many; an entry takes about 100.
_CHUNK_BYTES = 2**20
_REQUEST_BYTES = 2**23  # One read from a bucket asks for so many.
_THREADS = 4  # Hashing releases the GIL.
# Errors of file systems on which folders, or files opened for reading, cannot be synced.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


@dataclasses.dataclass(frozen=True)
class FileProblem:
    """A file that differs from the manifest, by its path in the step's folder, and how it differs."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """JSON header of a step, and the bytes of its files by their path in the folder, without `NAME` and `HASHES`."""

    header: Mapping[str, Any]
    sizes: Mapping[str, int]

    def to_bytes(self) -> bytes:
        return _signed({**self.header, "files": dict(sorted(self.sizes.items()))})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parses the exact output of `to_bytes`; raises `ValueError` if any byte differs."""
        with _parsing(data) as tree:
            return cls(header=tree, sizes=dict(tree.pop("files")))

    @property
    def num_bytes(self) -> int:
        """Total size of all files."""
        return sum(self.sizes.values())


@dataclasses.dataclass(frozen=True)
class Hashes:
    """SHA-256 of a manifest and of its files; processors compute SHA-256 faster than BLAKE2."""

    manifest: str
    files: Mapping[str, str]

    def to_bytes(self) -> bytes:
        return _signed({"manifest": self.manifest, "files": dict(sorted(self.files.items()))})

    @classmethod
    def from_bytes(cls, data: bytes, manifest: Manifest) -> Hashes:
        """Parses the exact output of `to_bytes`; raises `ValueError` if any byte differs, or it is of another step."""
        with _parsing(data) as tree:
            hashes = cls(tree["manifest"], dict(tree["files"]))
        if hashes.manifest != _sha256(manifest.to_bytes()) or hashes.files.keys() != manifest.sizes.keys():
            raise ValueError("that of another manifest")
        return hashes


def _signed(tree: Mapping[str, Any]) -> bytes:
    """The tree as JSON, with a digest of that JSON."""
    return (json.dumps({**tree, "digest": _sha256(json.dumps(tree, indent=1).encode())}, indent=1) + "\n").encode()


@contextlib.contextmanager
def _parsing(data: bytes) -> Iterator[dict[str, Any]]:
    """Context with the tree of the exact output of `_signed`; it raises `ValueError` for any other data."""
    try:
        tree = parse_json_object(data)
        del tree["digest"]
        if _signed(tree) != data:
            raise ValueError(OTHER_CONTENTS)
        yield tree
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(OTHER_CONTENTS if data else "empty") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read(folder: epath.Path) -> Manifest | None:
    """Reads the manifest in `folder`; None if there is none; raises `ValueError` when it is damaged."""
    data = _read(folder / NAME)
    return None if data is None else Manifest.from_bytes(data)


def read_hashes(folder: epath.Path, manifest: Manifest) -> Hashes | None:
    """Reads the hashes that belong to `manifest`; None if there are none; raises `ValueError` when they are damaged."""
    data = _read(folder / HASHES)
    return None if data is None else Hashes.from_bytes(data, manifest)


def _read(path: epath.Path) -> bytes | None:
    try:
        return read_bytes(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(_unreadable(error)) from error


def write(folder: epath.Path, header: Mapping[str, Any]) -> Manifest:
    """Syncs all files in `folder` to disk and writes their manifest; the step then survives a crash of the machine.

    Every file is synced here, before older steps are deleted.
    """
    remove(folder / HASHES)  # An earlier step in this folder of a bucket may have left them.
    if is_remote(folder):
        manifest = Manifest(header, file_sizes(folder))
        atomic_write(folder / NAME, manifest.to_bytes())
        return manifest
    files = list_files(folder)
    _in_threads(_sync_file, list(files.values()))
    manifest = Manifest(header, file_sizes(folder))
    (folder / NAME).write_bytes(manifest.to_bytes())
    _sync_file(folder / NAME)
    for subfolder, _, _ in os.walk(folder):
        sync_folder(subfolder)
    return manifest


def make_hashes(manifest: Manifest, files: Mapping[str, str]) -> Hashes:
    """The hashes that belong to `manifest`, from those of all of its files."""
    return Hashes(_sha256(manifest.to_bytes()), files)


def hash_files(
    folder: epath.Path, sizes: Mapping[str, int], progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    """SHA-256 of the files of a step that have these sizes, by name; `progress` as in `compare`."""
    return dict(zip(sizes, _in_threads(lambda name: hash_file(folder, name, sizes[name], progress), list(sizes))))


def compare(
    folder: epath.Path, manifest: Manifest, hashes: Hashes | None, progress: Callable[[int], None] | None = None
) -> list[FileProblem]:
    """Returns the files of `folder` that differ from the manifest and the hashes, sorted by name.

    Args:
      folder: of a step.
      manifest: returned by `read`.
      hashes: returned by `read_hashes`; None: only names and sizes are compared.
      progress: called with the number of bytes read since its last call.
    """
    existing = file_sizes(folder)
    extra = [FileProblem(name, EXTRA) for name in existing.keys() - manifest.sizes.keys()]

    def check(name: str) -> FileProblem | None:
        if name not in existing:
            return FileProblem(name, MISSING)
        size, expected = existing[name], manifest.sizes[name]
        if size != expected:
            return FileProblem(name, f"size {size:,} instead of {expected:,}")
        what = None if hashes is None else _check_contents(folder, name, size, hashes.files[name], progress)
        return None if what is None else FileProblem(name, what)

    names = [name for name in manifest.sizes if not any(map(is_made_by_system, name.split("/")))]
    problems = _in_threads(check, names)
    return sorted([*filter(None, problems), *extra], key=lambda problem: problem.file)


def _check_contents(
    folder: epath.Path, name: str, size: int, expected: str, progress: Callable[[int], None] | None
) -> str | None:
    try:
        return None if hash_file(folder, name, size, progress) == expected else OTHER_CONTENTS
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return _unreadable(error)
    except ValueError:
        return IRREGULAR


def check_bytes(data: bytes, name: str, manifest: Manifest, hashes: Hashes | None) -> str | None:
    """How the bytes of a small file differ from the manifest and the hashes, or None."""
    if name not in manifest.sizes:
        return EXTRA
    if len(data) != manifest.sizes[name]:
        return f"size {len(data):,} instead of {manifest.sizes[name]:,}"
    return None if hashes is None or _sha256(data) == hashes.files[name] else OTHER_CONTENTS


def hash_file(folder: epath.Path, name: str, size: int, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the first `size` bytes of a file, or of all of a local one."""
    digest = hashlib.sha256()
    for chunk in _remote_chunks(folder, name, size) if is_remote(folder) else _local_chunks(folder / name):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()


def _local_chunks(path: epath.Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _remote_chunks(folder: epath.Path, name: str, size: int) -> Iterator[bytes]:
    objects = open_folder(folder)
    for start in range(0, size, _REQUEST_BYTES):
        request = functools.partial(objects.read, name, start, min(size, start + _REQUEST_BYTES))
        yield with_retries(request, folder / name)


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of all files below `folder` by their relative path, without the manifest and the hashes.

    Files that file systems and desktops create are left out, since they come and go.
    """
    if is_remote(folder):
        return {name: size for name, size in list_objects(folder).items() if name not in (NAME, HASHES)}
    sizes = {}
    for name, path in list_files(folder).items():
        with contextlib.suppress(OSError):  # A link that leads nowhere, or a file that was deleted meanwhile.
            sizes[name] = os.stat(path).st_size
    return sizes


def list_files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files of `file_sizes` on a disk; a symbolic link counts as a file, whatever its target."""
    files = {}
    for path in folder.iterdir():
        if is_made_by_system(path.name):
            continue
        if path.is_dir() and not os.path.islink(path):
            files |= {f"{path.name}/{name}": file for name, file in list_files(path).items()}
        else:
            files[path.name] = path
    return {name: path for name, path in files.items() if name not in (NAME, HASHES)}


def _sync_file(path: epath.Path) -> None:
    """Flushes the contents of a local file to disk."""
    with open_regular(path) as file:
        _sync(file.fileno())


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


def _in_threads(work: Callable, items: Collection) -> list:
    """Maps `work` over the items in threads; results are in the order of the items."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="hash"))
        stack.callback(pool.shutdown, cancel_futures=True)  # After an error no further item is started.
        return list(pool.map(work, items))
