"""Atomic file writes, on a disk by a rename and in a bucket by nature.

Also checks of folders given on the command line, and names of files that file systems and desktops create.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import read_file

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
        return
    length = len(os.fsencode(os.path.abspath(path)))
    if length > _MAX_FOLDER_BYTES:
        raise UserError(f"{flag} is too long a path, {length:,} bytes", path, "Give a shorter path")
    if os.path.isdir(path):
        return
    if os.path.islink(path):
        target = os.readlink(path)
        raise UserError(f"{flag} is a symbolic link that leads to no folder ({target})", path, "Fix the link")
    if os.path.lexists(path):
        raise UserError(f"{flag} is a file", path, "Give a folder")
    existing = next(str(parent) for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not os.path.isdir(existing):
        raise UserError(f"{flag} cannot be made, since {existing} is no folder", path, "Give another folder")


def make_folder(path: epath.PathLike, flag: str) -> None:
    """Creates the folder `path`, given by `flag`, and its parents; raises `UserError` if that fails."""
    check_folder(path, flag)
    try:
        if is_remote(path):
            epath.Path(path).mkdir(parents=True, exist_ok=True)
            return
        folder = Path(os.path.abspath(path))
        # `mkdir(parents=True)` recurses once a level, which is too deep for long paths.
        for parent in (*reversed(folder.parents), folder):
            if not parent.is_dir():
                parent.mkdir(exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror or error} ({path})"
        raise UserError(f"{flag} cannot be made", reason, "Give a folder that can be written") from error


def read_bytes(path: epath.PathLike, max_bytes: int) -> bytes:
    """Reads a file of untrusted origin; a local one by `untrusted.read_file`, with its limits."""
    return epath.Path(path).read_bytes() if is_remote(path) else read_file(path, max_bytes)


def atomic_write(path: epath.PathLike, data: bytes) -> None:
    """Creates or replaces the file `path`; readers see either the old contents or all of `data`."""
    if is_remote(path):
        epath.Path(path).write_bytes(data)
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
        epath.Path(part).copy(path, overwrite=True)
        part.unlink()
        return
    with part.open("rb") as file:
        os.fsync(file.fileno())  # Otherwise a crash of the machine could leave an empty file.
    part.replace(path)


def part_path(path: Path) -> Path:
    """A hidden temporary name next to `path`, unique over processes and hosts."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
