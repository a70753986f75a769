"""Directory layout of checkpoints, with atomic commit and delete of a step, on a disk and in a bucket.

On a disk a step is committed by one rename, when all of it is written and hashed, and deleted by one: a folder whose
name is a number is a complete step. A bucket (gs://) has no renames, and copying tens of GB through this machine is no
substitute. There a folder is a step if it has a manifest, which is written last and deleted first, and if it has no
`set_aside.json`, a small object that sets the step aside; when that step is saved again, it gets a new folder,
`STEP-2`. Files of a step that was set aside are never deleted.
"""

from __future__ import annotations

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

from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.error_text import reason_of
from aimv2_jax.errors import UserError
from aimv2_jax.storage.files import is_remote

FOLDER = "checkpoints"
META = "meta/metadata"
MAX_META_BYTES = 256 << 20
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix; it is in the name of every folder that may be swept.
_COMMIT_FILE = "commit_success.txt"  # Written by Orbax.
_SET_ASIDE = "set_aside.json"  # Marks a folder of a bucket as set aside.
_SAVING = f"{TEMPORARY}-saving"
_DELETED = f"{TEMPORARY}-deleted"
_PROBE_BYTES = 1 << 16  # More than a save writes before it continues in the background.


def absolute(workdir: str | Path) -> epath.Path:
    """Absolute path, as Orbax requires; bucket paths are absolute already."""
    if not is_remote(workdir):
        return epath.Path(os.path.abspath(workdir))
    try:
        return epath.Path(workdir)
    except KeyError as error:
        raise UserError("no such kind of storage", str(workdir), "Give a folder, or gs://BUCKET/FOLDER") from error


def committed_steps(folder: epath.Path) -> list[int]:
    """All committed steps, in ascending order."""
    return sorted(_step_paths(folder))


def step_path(folder: epath.Path, step: int) -> epath.Path:
    """The folder of a step, or the path that a new step would have."""
    return _step_paths(folder).get(step, folder / str(step)) if is_remote(folder) else folder / str(step)


def _step_paths(folder: epath.Path) -> dict[int, epath.Path]:
    """The folders of all committed steps."""
    if not folder.is_dir():
        return {}
    if not is_remote(folder):
        return {int(path.name): path for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)}
    candidates = [
        (match, path) for path in folder.iterdir() if (match := re.fullmatch("(0|[1-9][0-9]*)(-[0-9]+)?", path.name))
    ]
    return {int(match[1]): path for match, path in candidates if _is_committed(path)}


def _is_committed(path: epath.Path) -> bool:
    """Whether a folder in a bucket is a step: it has a manifest and was not set aside."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    return manifest.NAME in names and _SET_ASIDE not in names


def set_aside_names(folder: epath.Path) -> list[str]:
    """Names that `set_aside` returned for the steps that were set aside."""
    if not folder.is_dir():
        return []
    if is_remote(folder):
        return sorted(f"{path.name}/{_SET_ASIDE}" for path in folder.iterdir() if (path / _SET_ASIDE).exists())
    return sorted(path.name for path in folder.iterdir() if re.fullmatch("[a-z]+-[0-9]+-[0-9]+", path.name))


def reserve_folder(folder: epath.Path, step: int) -> str:
    """The name of a folder to write a step to before `commit`; on a disk it is always a new name.

    Threads of a failed save may still write to the folder of that save.

    Raises:
      OSError: when no new folder with a small file in it can be created on the disk.
    """
    if is_remote(folder):
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (folder / name / _SET_ASIDE).exists())
    if not folder.is_dir():  # Orbax would create it, possibly on the wrong disk after an unmount.
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


def commit(folder: epath.Path, name: str, step: int, header: Mapping[str, Any]) -> None:
    """Writes the manifest of a step whose other files are written in the folder `name`, and commits the step."""
    written = folder / name
    manifest.write(written, header)
    if not is_remote(folder):
        target = folder / str(step)
        if target.exists():  # rename(2) would replace an empty folder.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        written.rename(target)
        manifest.sync_folder(folder)


def sweep(folder: epath.Path) -> dict[str, str]:
    """Deletes half-written and half-deleted steps, and no folder of another origin.

    Returns:
      `{name: reason}` of every folder that could not be deleted.
    """
    undeleted: dict[str, str] = {}
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if path.name.partition(TEMPORARY)[0].isdecimal() and TEMPORARY in path.name:
                undeleted |= remove(path)
    return undeleted


def delete(folder: epath.Path, step: int) -> dict[str, str]:
    """Deletes a step atomically, so that no reader sees an incomplete step; returns the same as `sweep`."""
    path = step_path(folder, step)
    try:
        if is_remote(folder):
            (path / manifest.NAME).unlink(missing_ok=True)
            (path / _COMMIT_FILE).unlink(missing_ok=True)
        else:
            path = path.rename(folder / f"{step}{_DELETED}-{secrets.token_hex(4)}")
    except Exception as error:
        return _undeleted(path, error)
    return remove(path)


def remove(path: epath.Path) -> dict[str, str]:
    """Deletes a folder; returns the same as `sweep`."""
    try:
        path.rmtree(missing_ok=True)
    except Exception as error:
        return _undeleted(path, error)
    return {}


def _undeleted(path: epath.Path, error: Exception) -> dict[str, str]:
    if isinstance(error, OSError) or is_remote(path):  # Buckets raise TensorFlow's or fsspec's own exceptions.
        return {path.name: reason_of(error)}
    raise error


def set_aside(folder: epath.Path, step: int, why: str) -> str:
    """Removes a step from the committed steps and keeps its files.

    Returns:
      The folder that it was renamed to, `WHY-STEP-N`; in a bucket, the object that was added to its folder.
    """
    source = step_path(folder, step)
    if is_remote(folder):
        (source / _SET_ASIDE).write_text(json.dumps({"why": why, "step": step}) + "\n")
        return f"{source.name}/{_SET_ASIDE}"
    target = next(path for number in itertools.count(1) if not (path := folder / f"{why}-{step}-{number}").exists())
    source.rename(target)
    manifest.sync_folder(folder)
    return target.name


def free_bytes(path: epath.Path) -> int | None:
    """Free space on the disk of `path` or of its nearest existing parent; None for a bucket."""
    if is_remote(path):
        return None
    local = Path(path).absolute()
    return shutil.disk_usage(next(parent for parent in (local, *local.parents) if parent.exists())).free
