"""Where the steps of a run lie, and how one begins and ends to be a step; on a disk, and in a bucket.

On a disk a step comes into being by one rename, when all of it is written and hashed, and ends by one: a folder whose
name is a number is a whole step. A bucket (gs://) has no renames, and copying tens of GB through this machine is no
substitute. There, the manifest, written last and deleted first, makes a folder a step, and a small object beside it
(`set_aside.json`) makes it none any more; a step that is saved again after that gets a folder of its own, `STEP-2`.
What is set aside keeps its files, which nothing here ever deletes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.files import is_remote, read_whole
from aimv2_jax.train import manifest
from aimv2_jax.train.words import reason_of
from aimv2_jax.untrusted import parse_json_object

FOLDER = "checkpoints"
META = "meta/metadata"
MAX_META_BYTES = 256 << 20
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's own: in the name of whatever may be swept.
COMMIT_FILE = "commit_success.txt"  # Orbax's, too: in a bucket, a step of format 1 is whole when it has one.
_SET_ASIDE = "set_aside.json"  # In a bucket: this folder is no step any more.
_SAVING, _DELETED = f"{TEMPORARY}-saving", f"{TEMPORARY}-deleted"
_PROBE_BYTES = 1 << 16  # More than all that a save writes before it goes on in the background.


def absolute(workdir: str | Path) -> epath.Path:
    """The path from the root, which Orbax wants; a bucket's is that anyway."""
    if not is_remote(workdir):
        return epath.Path(os.path.abspath(workdir))
    try:
        return epath.Path(workdir)
    except KeyError as error:
        raise UserError("no such kind of storage", str(workdir), "Give a folder, or gs://BUCKET/FOLDER") from error


def committed_steps(folder: epath.Path) -> list[int]:
    """The steps that were saved to their end, in rising order."""
    return sorted(_places(folder))


def place(folder: epath.Path, step: int) -> epath.Path:
    """The folder of a step, or where it would be."""
    return _places(folder).get(step, folder / str(step)) if is_remote(folder) else folder / str(step)


def _places(folder: epath.Path) -> dict[int, epath.Path]:
    """The folders of all whole steps."""
    if not folder.is_dir():
        return {}
    if not is_remote(folder):
        return {int(path.name): path for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)}
    named = [
        (found, path) for path in folder.iterdir() if (found := re.fullmatch("(0|[1-9][0-9]*)(-[0-9]+)?", path.name))
    ]
    return {int(found[1]): path for found, path in named if _is_whole(path)}


def _is_whole(path: epath.Path) -> bool:
    """Whether a folder in a bucket is a step: it has a manifest, or is of format 1, which had none, and committed."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if _SET_ASIDE in names:
        return False
    if manifest.NAME in names or COMMIT_FILE not in names:
        return manifest.NAME in names
    with contextlib.suppress(OSError, ValueError, KeyError):
        return parse_json_object(read_whole(path / META, MAX_META_BYTES))["format_version"] == 1
    return False


def set_aside_names(folder: epath.Path) -> list[str]:
    """What `set_aside` has returned for the steps that were set aside."""
    if not folder.is_dir():
        return []
    if is_remote(folder):
        return sorted(f"{path.name}/{_SET_ASIDE}" for path in folder.iterdir() if (path / _SET_ASIDE).exists())
    return sorted(path.name for path in folder.iterdir() if re.fullmatch("[a-z]+-[0-9]+-[0-9]+", path.name))


def new_place(folder: epath.Path, step: int) -> str:
    """The name of a folder in which a step can be written until `commit` makes it one; on a disk, it is a fresh one.

    A write that failed may still be at work in the folder that it had.

    Raises:
      OSError: when the disk takes no new folder with a small file in it.
    """
    if is_remote(folder):
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (folder / name / _SET_ASIDE).exists())
    if not folder.is_dir():  # Orbax would make it again: on the wrong disk, where that of the workdir is gone.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    name = f"{step}{_SAVING}-{secrets.token_hex(4)}"
    probe = folder / f"{name}-probe"
    probe.mkdir()
    try:
        (probe / "file").write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        error.filename = str(probe / "file")
        raise
    finally:
        remove(probe)
    return name


def commit(folder: epath.Path, name: str, step: int, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a step that is all written otherwise, in the folder `name`, and makes it a step."""
    written = folder / name
    manifest.write(written, about)
    if not is_remote(folder):
        target = folder / str(step)
        if target.exists():  # An empty folder would be replaced, whoever's it is.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        written.rename(target)
        manifest.sync_folder(folder)


def sweep(folder: epath.Path) -> dict[str, str]:
    """Deletes half-written and half-deleted steps; nothing that could be anybody else's.

    Returns:
      Why what could not be deleted is still there, by its name.
    """
    left: dict[str, str] = {}
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if path.name.partition(TEMPORARY)[0].isdecimal() and TEMPORARY in path.name:
                left |= remove(path)
    return left


def delete(folder: epath.Path, step: int) -> dict[str, str]:
    """Deletes a step so that it is at no moment a step with something missing; returns the same as `sweep`."""
    path = place(folder, step)
    try:
        if is_remote(folder):
            (path / manifest.NAME).unlink(missing_ok=True)
            (path / COMMIT_FILE).unlink(missing_ok=True)
        else:
            path = path.rename(folder / f"{step}{_DELETED}-{secrets.token_hex(4)}")
    except Exception as error:
        return _refusal(path, error)
    return remove(path)


def remove(path: epath.Path) -> dict[str, str]:
    """Deletes a folder; returns the same as `sweep`."""
    try:
        path.rmtree(missing_ok=True)
    except Exception as error:
        return _refusal(path, error)
    return {}


def _refusal(path: epath.Path, error: Exception) -> dict[str, str]:
    if isinstance(error, OSError) or is_remote(path):  # A bucket raises TensorFlow's or fsspec's own kinds.
        return {path.name: reason_of(error)}
    raise error


def set_aside(folder: epath.Path, step: int, why: str) -> str:
    """Makes a step no step any more and keeps its files.

    Returns:
      What now tells of it in `folder`: the folder that it was renamed to, `WHY-STEP-N`; in a bucket, the object that
      was added to it.
    """
    source = place(folder, step)
    if is_remote(folder):
        (source / _SET_ASIDE).write_text(json.dumps({"why": why, "step": step}) + "\n")
        return f"{source.name}/{_SET_ASIDE}"
    target = next(path for number in itertools.count(1) if not (path := folder / f"{why}-{step}-{number}").exists())
    source.rename(target)
    manifest.sync_folder(folder)
    return target.name


def free_bytes(path: epath.Path) -> int | None:
    """Room on the disk of `path` or of the nearest folder above that exists; None where there is no such limit."""
    if is_remote(path):
        return None
    local = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (local, *local.parents) if place.exists())).free
