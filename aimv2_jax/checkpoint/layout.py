"""Directory layout of checkpoints, with atomic commit and delete of a step, on a disk and in a bucket.

On a disk a step is committed by one rename, when all of it is written, and deleted by one: a folder whose
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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.error_text import reason_of
from aimv2_jax.storage.bucket import check_scheme
from aimv2_jax.storage.files import atomic_move, atomic_write, is_remote, list_names, list_objects, remove

FOLDER = "checkpoints"
META = "meta/metadata"
MAX_META_BYTES = 256 << 20
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix; it is in the name of every folder that may be swept.
_SET_ASIDE = "set_aside.json"  # Marks a folder of a bucket as set aside.
_STEP_FOLDER = "((0|[1-9][0-9]*)(?:-[0-9]+)?)"  # A step that is saved again in a bucket gets a suffix.
_SAVING = f"{TEMPORARY}-saving"
_HASHES = f"{TEMPORARY}-hashes"
_DELETED = f"{TEMPORARY}-deleted"
_PROBE_BYTES = 1 << 16  # More than a save writes before it continues in the background.


def absolute(workdir: str | Path) -> epath.Path:
    """Absolute path, as Orbax requires; bucket paths are absolute already."""
    if not is_remote(workdir):
        return epath.Path(os.path.abspath(workdir))
    check_scheme(workdir, "checkpoint")
    return epath.Path(workdir)


def committed_steps(folder: epath.Path) -> list[int]:
    """All committed steps, in ascending order."""
    return sorted(_step_names(folder))


def step_path(folder: epath.Path, step: int) -> epath.Path:
    """The folder of a step, or the path that a new step would have."""
    return folder / (_step_names(folder).get(step, str(step)) if is_remote(folder) else str(step))


def _step_names(folder: epath.Path) -> dict[int, str]:
    """The names of the folders of all committed steps."""
    if not is_remote(folder):
        return {int(name): name for name in list_names(folder) if re.fullmatch("0|[1-9][0-9]*", name)}
    found = list_objects(folder)
    manifests = (match for name in found if (match := re.fullmatch(f"{_STEP_FOLDER}/{manifest.NAME}", name)))
    return {int(match[2]): match[1] for match in manifests if f"{match[1]}/{_SET_ASIDE}" not in found}


def unhashed_steps(folder: epath.Path) -> list[int]:
    """The committed steps without hashes."""
    if is_remote(folder):
        found = list_objects(folder)
        return sorted(step for step, name in _step_names(folder).items() if f"{name}/{manifest.HASHES}" not in found)
    return [step for step in committed_steps(folder) if manifest.HASHES not in list_names(folder / str(step))]


def half_written(folder: epath.Path) -> list[str]:
    """Names of folders of a bucket whose step is neither committed nor set aside; on a disk their names tell them."""
    if not is_remote(folder):
        return []
    found = list_objects(folder)
    names = {match[1] for name in found if (match := re.match(f"{_STEP_FOLDER}/", name))}
    marks = (manifest.NAME, _SET_ASIDE)
    return sorted(name for name in names if not any(f"{name}/{mark}" in found for mark in marks))


def set_aside_names(folder: epath.Path) -> list[str]:
    """Names that `set_aside` returned for the steps that were set aside."""
    if is_remote(folder):
        return sorted(name for name in list_objects(folder) if re.fullmatch(f"[^/]+/{_SET_ASIDE}", name))
    return [name for name in list_names(folder) if re.fullmatch("[a-z]+-[0-9]+-[0-9]+", name)]


def reserve_folder(folder: epath.Path, step: int) -> str:
    """The name of a folder to write a step to before `commit`; on a disk it is always a new name.

    Threads of a failed save may still write to the folder of that save.

    Raises:
      OSError: when no new folder with a small file in it can be created on the disk.
    """
    if is_remote(folder):
        aside = set_aside_names(folder)
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if f"{name}/{_SET_ASIDE}" not in aside)
        remove(folder / name)  # Leftovers of a killed save, or of a deletion.
        return name
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
        delete_folder(probe)
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


def commit_hashes(folder: epath.Path, step: int, hashes: manifest.Hashes) -> None:
    """Adds the hashes to a step atomically; a kill leaves nothing in the step's folder that is not part of it."""
    target = step_path(folder, step) / manifest.HASHES
    if is_remote(folder):
        atomic_write(target, hashes.to_bytes())
        return
    part = Path(folder / f"{step}{_HASHES}-{secrets.token_hex(4)}")
    try:
        part.write_bytes(hashes.to_bytes())
        atomic_move(part, target)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: epath.Path, half_deleted: Collection[str] = ()) -> dict[str, str]:
    """Deletes half-written hashes, half-written and half-deleted steps, and no folder of another origin.

    Args:
      folder: the folder of all steps.
      half_deleted: names that `delete` returned. In a bucket they do not tell half-deleted steps.

    Returns:
      `{name: reason}` of every folder that could not be deleted.
    """
    if jax.process_index() != 0:
        return {}
    if is_remote(folder):
        names = set(half_deleted) - set(_step_names(folder).values())
    else:
        names = {name for name in list_names(folder) if name.partition(TEMPORARY)[0].isdecimal() and TEMPORARY in name}
    return {name: why for name in names for name, why in delete_folder(folder / name).items()}


def delete(folder: epath.Path, step: int) -> dict[str, str]:
    """Deletes a step atomically, so that no reader sees an incomplete step; returns the same as `sweep`."""
    path = step_path(folder, step)
    try:
        if is_remote(folder):
            remove(path / manifest.NAME)
        else:
            path = path.rename(folder / f"{step}{_DELETED}-{secrets.token_hex(4)}")
    except OSError as error:
        return {path.name: reason_of(error)}
    return delete_folder(path)


def delete_folder(path: epath.Path) -> dict[str, str]:
    """Deletes a folder; returns the same as `sweep`."""
    try:
        remove(path)
    except OSError as error:
        return {path.name: reason_of(error)}
    return {}


def set_aside(folder: epath.Path, step: int, why: str) -> str:
    """Removes a step from the committed steps and keeps its files.

    Returns:
      The folder that it was renamed to, `WHY-STEP-N`; in a bucket, the object that was added to its folder.
    """
    source = step_path(folder, step)
    if is_remote(folder):
        atomic_write(source / _SET_ASIDE, json.dumps({"why": why, "step": step}).encode() + b"\n")
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
