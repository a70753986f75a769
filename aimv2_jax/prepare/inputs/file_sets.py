"""Which files of an input belong to the dataset: those of one split, complete, and without caches beside them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import arrow
from aimv2_jax.prepare.inputs.hugging_face import SPLITS_FILE, STATE_FILE, saved_files, saved_splits

# Hugging Face's train-00000-of-00005-0123456789abcdef.parquet, TFDS's and beam's shards.
_SERIES = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)", re.DOTALL)


def select(paths: Iterable[str], root: str | None, split: str | None, follow_links: bool) -> tuple[list[str], bool]:
    """Selects the files of a dataset among the candidates `paths`.

    A file belongs to a split if a folder below `root` has the split's name, or its own name is the split's, up to the
    first "-" or ".".

    Args:
      root: the folder that the user gave, None for a file or a glob, whose files are the user's choice.
      split: the value of --split.
      follow_links: follows links that lead out of the folder.

    Returns:
      The paths in order, and whether they were selected by `split`; otherwise their rows have to be.

    Raises:
      UserError: if files of the dataset are missing, or it has several splits or lacks `split`.
    """
    paths = _without_other_splits(list(paths), split, follow_links)
    is_named = False
    if root is not None and split is not None:
        named = [path for path in paths if _names_split(posixpath.relpath(path, root), split)]
        paths, is_named = named or paths, bool(named)
    paths = _without_caches(paths, follow_links)
    if root is not None:
        _check_series(paths)
    return paths, is_named


def _names_split(path: str, split: str) -> bool:
    *folders, name = path.split("/")
    return split in folders or re.split(r"[-.]", name, maxsplit=1)[0] == split


def _without_other_splits(paths: list[str], split: str | None, follow_links: bool) -> list[str]:
    """`paths` without the files of a DatasetDict that are of other splits."""
    for folder in [posixpath.dirname(path) for path in paths if posixpath.basename(path) == SPLITS_FILE]:
        splits = saved_splits(folder, follow_links)
        if split is None and len(splits) != 1:
            raise UserError("--input has several splits", f"{folder}: {', '.join(splits)}", "Give --split NAME")
        if split is not None and split not in splits:
            raise UserError(f"--input {folder} has no such split", split, f"It has {', '.join(splits) or 'none'}")
        chosen = split or splits[0]
        if f"{folder}/{chosen}/{STATE_FILE}" not in paths:
            what = f"--input is incomplete: the split {chosen} has no {STATE_FILE}"
            raise UserError(what, f"{folder}/{chosen}", "Copy the dataset again")
        others = tuple(f"{folder}/{name}/" for name in splits if name != chosen)
        paths = [path for path in paths if not path.startswith(others)]
    return paths


def _without_caches(paths: list[str], follow_links: bool) -> list[str]:
    """`paths` without the Arrow files that are no part of the saved dataset beside them: caches of its map and filter.

    Raises:
      UserError: if a file of a saved dataset is missing.
    """
    existing = set(paths)
    caches: set[str] = set()
    for folder in dict.fromkeys(
        posixpath.dirname(path) for path in paths if path.endswith((arrow.SUFFIX, f"/{STATE_FILE}"))
    ):
        saved = saved_files(folder, follow_links)
        if saved is None:
            continue
        members = {f"{folder}/{name}" for name in saved}
        if f"{folder}/{STATE_FILE}" in existing and (missing := sorted(members - existing)):
            what = f"--input is incomplete: {len(missing)} of {len(members)} files of its {STATE_FILE} are missing"
            raise UserError(what, missing[0], "Copy the dataset again")
        own = {path for path in existing if posixpath.dirname(path) == folder and path.endswith(arrow.SUFFIX)}
        caches |= own - members
    return [path for path in paths if path not in caches]


def _check_series(paths: Collection[str]) -> None:
    """Raises `UserError` if a series NAME-00000-of-00005 lacks a file."""
    found: dict[tuple[str, str, int], set[int]] = {}
    for path in paths:
        if match := _SERIES.fullmatch(path):
            suffix = posixpath.splitext(match["rest"])[1]
            found.setdefault((match["stem"], suffix, int(match["count"])), set()).add(int(match["number"]))
    for (stem, suffix, count), numbers in found.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            what = f"--input is incomplete: {len(missing)} of {count} files are missing"
            remedy = "Complete the download, or give a glob to use only the files that are there"
            raise UserError(what, f"{stem}-{missing[0]:05d}-of-{count:05d}{suffix}", remedy)
