"""Where the steps of a run lie, and how one begins and ends to be a step; on a disk, and in a bucket.

On a disk a step comes into being by one rename, when all of it is written and hashed, and ends by one: a folder whose
name is a number is a whole step. A bucket (gs://) has no renames: there the manifest, written last and deleted first,
makes a folder a step. What is set aside keeps its files under another name, which nothing here ever deletes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.errors import UserError
from aimv2_jax.train import manifest
from aimv2_jax.train.words import first_line

FOLDER = "checkpoints"
META = "meta/metadata"
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's own: in the name of whatever may be swept.
COMMIT_FILE = "commit_success.txt"  # Orbax's, too: in a bucket, a step of format 1 is whole when it has one.
_SAVING, _DELETED = f"{TEMPORARY}-saving", f"{TEMPORARY}-deleted"


def absolute(workdir: str | Path) -> epath.Path:
    """The path from the root, which Orbax wants; a bucket's is that anyway."""
    if "://" not in str(workdir):
        return epath.Path(os.path.abspath(workdir))
    try:
        return epath.Path(workdir)
    except KeyError as error:
        raise UserError("no such kind of storage", str(workdir), "Give a folder, or gs://BUCKET/FOLDER") from error


def renames(folder: epath.Path) -> bool:
    """Whether a folder there can be renamed at one stroke."""
    return "://" not in str(folder)


def make_folder(folder: epath.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--workdir cannot be made", first_line(error), "Give a folder that can be written") from error


def committed_steps(folder: epath.Path) -> list[int]:
    """The steps that were saved to their end, in rising order."""
    if not folder.is_dir():
        return []
    steps = sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
    return steps if renames(folder) else [step for step in steps if _is_whole(folder / str(step))]


def _is_whole(place: epath.Path) -> bool:
    """Whether a folder in a bucket is a step: it has a manifest, or is of format 1, which had none, and committed."""
    if (place / manifest.NAME).exists():
        return True
    if not (place / COMMIT_FILE).exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((place / META).read_text())["format_version"] == 1
    return False


def set_aside_names(folder: epath.Path) -> list[str]:
    """The folders of steps that were set aside."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if re.fullmatch("[a-z]+-[0-9]+-[0-9]+", path.name))


def saving_place(folder: epath.Path, step: int) -> epath.Path:
    """Where a step is written, until `commit` makes it one."""
    return folder / f"{step}{_SAVING}" if renames(folder) else folder / str(step)


def commit(folder: epath.Path, step: int, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a step that is all written otherwise, and makes it a step."""
    place = saving_place(folder, step)
    manifest.write(place, about)
    if renames(folder):
        target = folder / str(step)
        if target.exists():  # An empty folder would be replaced, whoever's it is.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        place.rename(target)
        manifest.sync_folder(folder)


def sweep(folder: epath.Path) -> None:
    """Deletes half-written and half-deleted steps; nothing that could be anybody else's."""
    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if path.name.partition(TEMPORARY)[0].isdecimal() and TEMPORARY in path.name:
                path.rmtree(missing_ok=True)


def delete(folder: epath.Path, step: int) -> None:
    """Deletes a step so that it is at no moment a step with something missing."""
    if jax.process_index() != 0:
        return
    path = folder / str(step)
    if renames(folder):
        path = path.rename(folder / f"{step}{_DELETED}")
    else:
        _uncommit(path)
    path.rmtree()


def set_aside(folder: epath.Path, step: int, why: str) -> str:
    """Makes a step no step any more and keeps its files, in the folder `WHY-STEP-N`, whose name it returns.

    In a bucket they are copied, and deleted at their old place when all of them are at the new one.
    """
    source = folder / str(step)
    target = next(place for number in itertools.count(1) if not (place := folder / f"{why}-{step}-{number}").exists())
    if renames(folder):
        source.rename(target)
        manifest.sync_folder(folder)
        return target.name
    for name, path in manifest.list_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        path.copy(target / name)
    _uncommit(source)
    source.rmtree()
    return target.name


def _uncommit(place: epath.Path) -> None:
    """Makes a folder in a bucket no step any more."""
    (place / manifest.NAME).unlink(missing_ok=True)
    (place / COMMIT_FILE).unlink(missing_ok=True)


def free_bytes(path: epath.Path) -> int | None:
    """Room on the disk of `path` or of the nearest folder above that exists; None where there is no such limit."""
    if not renames(path):
        return None
    local = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (local, *local.parents) if place.exists())).free
