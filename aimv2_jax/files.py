"""Files that appear whole or not at all: in a bucket all do, on a disk those that get their name at the end.

Beside them the folders that a command line names, and the names of files that nobody has asked for.
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

_MAX_FOLDER_BYTES = 3_500  # Of a path: Linux takes 4,096 (PATH_MAX), and a run's own files need the rest.
# Files and folders that file systems, desktops and tools for archives leave beside those of others.
_MADE_BY_SYSTEMS = re.compile(
    r"\.nfs[0-9a-fA-F]+"  # The NFS client's, for a deleted file that is still open (NFS FAQ, D2).
    r"|\.fuse_hidden[0-9a-fA-F]+"  # libfuse's, for the same.
    r"|\.DS_Store|\._.*|\.AppleDouble|__MACOSX|\.Spotlight-V100|\.Trashes|\.fseventsd"  # macOS and netatalk.
    r"|[Tt]humbs\.db|ehthumbs\.db|[Dd]esktop\.ini|\$RECYCLE\.BIN|System Volume Information"  # Windows.
    r"|\.directory|\.Trash-[0-9]+|lost\+found|@eaDir|\.snapshot"  # KDE, Linux desktops, ext4, Synology, NetApp.
)


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` has a scheme such as gs://."""
    return "://" in os.fspath(path)


def is_made_by_system(name: str) -> bool:
    """Whether a file or folder of this name comes from a file system or a desktop, and not from whoever uses it."""
    return _MADE_BY_SYSTEMS.fullmatch(name) is not None


def check_folder(path: epath.PathLike, flag: str) -> None:
    """Raises `UserError` where `path`, given by `flag`, is no folder and cannot become one; makes nothing."""
    path = os.fspath(path)
    if is_remote(path):
        return
    length = len(os.fsencode(os.path.abspath(path)))
    if length > _MAX_FOLDER_BYTES:
        raise UserError(f"{flag} is too long a path, {length:,} bytes", path, "Give a shorter one")
    if os.path.isdir(path):
        return
    if os.path.islink(path):
        target = os.readlink(path)
        raise UserError(f"{flag} is a symbolic link that leads to no folder ({target})", path, "Mend the link")
    if os.path.lexists(path):
        raise UserError(f"{flag} is a file", path, "Give a folder")
    above = next(str(one) for one in Path(os.path.abspath(path)).parents if os.path.lexists(one))
    if not os.path.isdir(above):
        raise UserError(f"{flag} cannot be made, since {above} is no folder", path, "Give another folder")


def make_folder(path: epath.PathLike, flag: str) -> None:
    """Makes the folder `path`, given by `flag`, and those above it; raises `UserError` where that cannot be."""
    check_folder(path, flag)
    try:
        if is_remote(path):
            epath.Path(path).mkdir(parents=True, exist_ok=True)
            return
        folder = Path(os.path.abspath(path))
        for one in (*reversed(folder.parents), folder):  # One by one: `mkdir(parents=True)` calls itself for each.
            if not one.is_dir():
                one.mkdir(exist_ok=True)
    except OSError as error:
        said = f"{error.strerror or error} ({path})"
        raise UserError(f"{flag} cannot be made", said, "Give a folder that can be written") from error


def read_whole(path: epath.PathLike, max_bytes: int) -> bytes:
    """The bytes of a file that others may have written; of a local one as `untrusted.read_file` reads it."""
    return epath.Path(path).read_bytes() if is_remote(path) else read_file(path, max_bytes)


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Makes the file `path`, or replaces it: whoever looks sees the old one, or all of `data`."""
    if is_remote(path):
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    part = part_of(path)
    try:
        part.write_bytes(data)
        move_whole(part, path)
    except OSError as error:
        error.filename = str(path)  # Python leaves it out where a full disk has no room.
        raise
    finally:
        with contextlib.suppress(OSError):  # What went wrong before is what counts.
            part.unlink()


def move_whole(part: Path, path: epath.PathLike) -> None:
    """Makes the finished file `part` the file `path`, which is on the same file system or in a bucket."""
    if is_remote(path):
        epath.Path(part).copy(path, overwrite=True)
        part.unlink()
        return
    with part.open("rb") as file:
        os.fsync(file.fileno())  # Without, a crash of the machine could leave the name and not the bytes.
    part.replace(path)


def part_of(path: Path) -> Path:
    """A hidden name beside `path` for what is to become it; no other process has it, on whatever host."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
