"""Reads, atomic writes and listings of files, on a disk or in a bucket.

A run accesses its workdir by these functions. In a bucket they retry what may be transient, and listings decide what
exists: a request that does not find an object is retried while the bucket lists that object.

Also checks of folders given on the command line, and names of files that file systems and desktops create.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.storage.bucket import bucket_errors, check_scheme, file_system, look_up_credentials
from aimv2_jax.storage.retries import STORAGE_RETRIES
from aimv2_jax.untrusted import read_file

# Pauses between the attempts of an operation in a bucket.
_PAUSES_S = (0.05, 0.1, 0.25, 0.6, 1.0, 2.0, 4.0)
# No attempt begins later. gcsfs itself retries a busy or unreachable bucket, six times within about half a minute.
_PATIENCE_S = 20.0
# A bucket may also refuse a request, or miss an object, for a moment only.
_TRANSIENT = (errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.EEXIST, errno.ENODATA)
# After the last attempt, these failures of a bucket are neither the user's nor ours.
_TEMPORARY = (errno.EAGAIN, errno.EEXIST, errno.ENODATA)

_Result = TypeVar("_Result")

# Linux allows paths of 4,096 bytes (PATH_MAX); a run's own files need the rest.
_MAX_FOLDER_BYTES = 3_500
# Files and folders that file systems, desktops and archive tools create.
_MADE_BY_SYSTEMS = re.compile(
    r"\.nfs[0-9a-fA-F]+"  # NFS client, for a deleted file that is still open (NFS FAQ, D2).
    r"|\.fuse_hidden[0-9a-fA-F]+"  # libfuse, for the same.
    r"|\.DS_Store|\._.*|\.AppleDouble|__MACOSX|\.Spotlight-V100|\.Trashes|\.fseventsd"  # macOS and netatalk.
    r"|[Tt]humbs\.db|ehthumbs\.db|[Dd]esktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows.
    r"|\.directory|\.Trash-[0-9]+|lost\+found|@eaDir|\.snapshot"  # KDE, Linux desktops, ext4, Synology, NetApp.
)


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` has a scheme such as gs://."""
    return "://" in os.fspath(path)


def is_made_by_system(name: str) -> bool:
    """Whether a file or folder of this name is created by a file system or a desktop, not by a user."""
    return _MADE_BY_SYSTEMS.fullmatch(name) is not None


def check_folder(path: epath.PathLike, flag: str) -> None:
    """Raises `UserError` if `path`, given by `flag`, is no folder and cannot be created; creates nothing."""
    path = os.fspath(path)
    if is_remote(path):
        check_scheme(path, flag)
        return
    length = len(os.fsencode(os.path.abspath(path)))
    if length > _MAX_FOLDER_BYTES:
        raise UserError(f"{flag} is too long a path, {length:,} bytes", path, "Give a shorter path")
    # It is looked for before it is looked at: another process of the run may make it at this moment.
    if os.path.lexists(path) and not os.path.isdir(path):
        if os.path.islink(path):
            target = os.readlink(path)
            raise UserError(f"{flag} is a symbolic link that leads to no folder ({target})", path, "Fix the link")
        raise UserError(f"{flag} is a file", path, "Give a folder")
    existing = next(str(parent) for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not os.path.isdir(existing):
        raise UserError(f"{flag} cannot be made, since {existing} is no folder", path, "Give another folder")


def make_folder(path: epath.PathLike, flag: str) -> None:
    """Creates the folder `path`, given by `flag`, and its parents; raises `UserError` if that fails.

    A bucket has no folders, so nothing is created there.
    """
    check_folder(path, flag)
    if is_remote(path):
        return
    try:
        folder = Path(os.path.abspath(path))
        # `mkdir(parents=True)` recurses once a level, which is too deep for long paths.
        for parent in (*reversed(folder.parents), folder):
            if not parent.is_dir():
                parent.mkdir(exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror or error} ({path})"
        raise UserError(f"{flag} cannot be made", reason, "Give a folder that can be written") from error


def read_bytes(path: epath.PathLike, max_bytes: int | None = None) -> bytes:
    """Reads a file of untrusted origin.

    Args:
      path: a local file is read by `untrusted.read_file` if `max_bytes` is given.
      max_bytes: limit on the size of a local file.

    Raises:
      OSError: FileNotFoundError if a bucket does not list the object.
      ValueError: as `untrusted.read_file`.
    """
    if is_remote(path):
        return with_retries(lambda: file_system(path).cat_file(os.fspath(path)), path)
    return Path(path).read_bytes() if max_bytes is None else read_file(path, max_bytes)


def exists(path: epath.PathLike) -> bool:
    """Whether there is a file or folder `path`."""
    if not is_remote(path):
        return os.path.exists(path)
    return with_retries(lambda: bool(_listed(os.fspath(path))), path, transient=_TRANSIENT)


def list_names(folder: epath.PathLike) -> list[str]:
    """Names of the files and folders directly in `folder`; empty if there is no such folder."""
    if is_remote(folder):
        return sorted({name.partition("/")[0] for name in list_objects(folder)})
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_objects(folder: epath.PathLike) -> dict[str, int]:
    """Bytes of all objects below a folder of a bucket, by their path in it."""
    root = os.fspath(folder).rstrip("/")
    found = with_retries(lambda: file_system(root).find(root, detail=True), root, transient=_TRANSIENT)
    start = len(root.partition("://")[2]) + 1
    return {name[start:]: int(entry["size"]) for name, entry in found.items() if len(name) > start}


def atomic_write(path: epath.PathLike, data: bytes) -> None:
    """Creates or replaces the file `path`; readers see either the old contents or all of `data`."""
    if is_remote(path):
        with_retries(lambda: file_system(path).pipe_file(os.fspath(path), data), path, transient=_TRANSIENT)
        return
    path = Path(path)
    part = part_path(path)
    try:
        part.write_bytes(data)
        atomic_move(part, path)
    except OSError as error:
        error.filename = str(path)  # Python omits the name in errors of a full disk.
        raise
    finally:
        with contextlib.suppress(OSError):  # An earlier error takes precedence.
            part.unlink()


def atomic_move(part: Path, path: epath.PathLike) -> None:
    """Moves the finished file `part` to `path`, which is on the same file system or in a bucket."""
    if is_remote(path):
        with_retries(lambda: file_system(path).put_file(str(part), os.fspath(path)), path, transient=_TRANSIENT)
        part.unlink()
        return
    with part.open("rb") as file:
        os.fsync(file.fileno())  # Otherwise a crash of the machine could leave an empty file.
    part.replace(path)


def remove(path: epath.PathLike) -> None:
    """Deletes a file or a folder with its contents, if it exists."""
    if is_remote(path):
        with_retries(lambda: _remove_objects(os.fspath(path)), path, transient=_TRANSIENT)
    elif os.path.isdir(path) and not os.path.islink(path):
        epath.Path(path).rmtree(missing_ok=True)
    else:
        Path(path).unlink(missing_ok=True)


def make_parent(path: epath.PathLike) -> None:
    """Creates the folder of a local file; a bucket has no folders."""
    if not is_remote(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def with_retries(
    call: Callable[[], _Result], path: epath.PathLike, transient: tuple[int, ...] | None = None
) -> _Result:
    """Calls `call`, which accesses `path`; in a bucket, transient failures are retried for some seconds, and counted.

    Args:
      call: may be called several times.
      path: local paths are not retried.
      transient: the errno values that are retried. By default, those of a read: an object that is not found is looked
        for in the listing first, and is absent if it is not there.

    Raises:
      OSError: EAGAIN if the bucket fails temporarily.
    """
    if not is_remote(path):
        return call()
    path, pauses_s, end_s = os.fspath(path), iter(_PAUSES_S), time.monotonic() + _PATIENCE_S
    while True:
        try:
            with bucket_errors(path):
                return call()
        except OSError as error:
            is_read = transient is None
            if error.errno not in (_TRANSIENT if is_read else transient):
                raise
            if is_read and error.errno == errno.ENOENT and not exists(path):
                raise
            pause_s = next(pauses_s, None)
            if pause_s is None or time.monotonic() > end_s:
                if error.errno in _TEMPORARY or (is_read and error.errno == errno.ENOENT):
                    raise OSError(errno.EAGAIN, error.strerror, path) from error
                raise
            STORAGE_RETRIES.add()
            time.sleep(pause_s)
            if error.errno == errno.EACCES:
                look_up_credentials(path)


def is_temporary(error: BaseException) -> bool:
    """Whether waiting may help: a bucket failed, and gave no other reason."""
    return isinstance(error, OSError) and error.errno in _TEMPORARY and is_remote(str(error.filename))


def _listed(path: str) -> list[str]:
    """The object `path` and all objects below it, as the bucket lists them."""
    folder, _, name = path.rstrip("/").rpartition("/")
    inner = path.partition("://")[2].rstrip("/")
    found = file_system(path).find(folder, prefix=name)
    return [other for other in found if other == inner or other.startswith(f"{inner}/")]


def _remove_objects(path: str) -> None:
    """Deletes the object `path` and all below it; raises OSError while the bucket still lists any of them."""
    if found := _listed(path):
        with contextlib.suppress(FileNotFoundError):
            file_system(path).rm(found)
        if _listed(path):
            raise OSError(errno.EAGAIN, "objects are still listed after they were deleted", path)


def part_path(path: Path) -> Path:
    """A hidden temporary name next to `path`, unique over processes and hosts."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
