"""Discovery of input shards in files, folders and globs; formats are recognised by content."""

from __future__ import annotations

import dataclasses
import glob
import os
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aimv2_jax.data.transforms.decode import FORMAT_OF
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import file_sets, image_folder, open_files, tables, webdataset
from aimv2_jax.prepare.inputs.reader import FORMATS
from aimv2_jax.prepare.inputs.samples import InputShard
from aimv2_jax.storage.bucket import check_scheme, file_system, scheme_of
from aimv2_jax.storage.files import exists, is_remote, list_names, list_objects, with_retries
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import is_inside

_HEAD_BYTES = 64 << 10
_THREADS = 64  # Requests to a bucket are slow but run in parallel.
# Suffixes of files that are not opened in folders, which may hold millions of them.
_SKIPPED_SUFFIXES = tuple(f".{suffix}" for suffix in (*FORMAT_OF, "txt", "arrayrecord", "bag"))
_SUPPORTED_FORMATS = (
    "Supported inputs are webdataset tars, parquet and Arrow with a column of images, .jsonl or .csv tables whose rows "
    f"name their images in a column {', '.join(tables.IMAGES)}, and {image_folder.PREFIX}DIR with a folder of images "
    "for each class"
)


def find_shards(inputs: Sequence[str], follow_links: bool = False, split: str | None = None) -> list[InputShard]:
    """Finds the shards of all `inputs` (PATHs and GLOBs, local or remote), each once, sorted by path.

    Args:
      follow_links: follows links that lead out of a local folder.
      split: the split of --split: shards that are not `of_split` have to be filtered by rows.

    Raises:
      UserError: if one of `inputs` does not exist, cannot be read or has no shards, a table has no images, files of a
        dataset are missing, it has several splits and none is given, or a link in a folder must not be followed.
    """
    found: dict[tuple[str, int], InputShard] = {}
    for given in inputs:
        if given.startswith(image_folder.PREFIX):
            shards = image_folder.find(given, split, follow_links)
            changes = dict(follow_links=follow_links, of_split=split is not None)
            found |= {(shard.path, shard.start): dataclasses.replace(shard, **changes) for shard in shards}
            continue
        check_scheme(given, "--input")
        with ThreadPoolExecutor(_THREADS) as pool:
            paths, root = _candidates(given, pool, follow_links)
            paths, of_split = file_sets.select(paths, root, split, follow_links)
            results = [result for result in pool.map(_recognise, paths) if result is not None]
        shards = [shard for _, result in results if isinstance(result, list) for shard in result]
        kinds = {shard.kind for shard in shards}
        for kind, result in results:
            # A table without images is an error next to tables with images; next to tars it may be an index of them.
            if isinstance(result, UserError) and (not shards or kind in kinds):
                raise result
        if not shards:
            raise UserError("--input has no readable input files", given, _SUPPORTED_FORMATS)
        changes = dict(follow_links=follow_links, of_split=of_split)
        found |= {(shard.path, shard.start): dataclasses.replace(shard, **changes) for shard in shards}
    unique: dict[tuple[str, int], InputShard] = {}
    # Files come before links to them, because the files that belong to a tar are in the tar's own folder.
    for shard in sorted(found.values(), key=lambda shard: (shard.path != _real(shard), shard.path)):
        unique.setdefault((_real(shard), shard.start), shard)
    return sorted(unique.values(), key=lambda shard: (shard.path, shard.start))


def _real(shard: InputShard) -> str:
    """Path of a file with all links resolved; a class folder keeps its name, which is the class."""
    is_folder = shard.kind == image_folder.KIND
    return shard.path if is_folder or is_remote(shard.path) else os.path.realpath(shard.path)


def _candidates(given: str, pool: ThreadPoolExecutor, follow_links: bool) -> tuple[list[str], str | None]:
    """Paths that `given` matches, sorted, and `given` itself if it is a folder."""
    if not given:  # Probably an unset shell variable; as a path it would be the current folder.
        raise UserError("--input is empty", given, "Give a file, a folder or a glob")
    if is_remote(given):
        with open_files.input_errors(given):
            paths = _remote_paths(given)
            root = None if given in paths or glob.has_magic(given) else given.rstrip("/")
            return _without_companions(paths, pool), root
    path = os.path.abspath(resolve_path(given))
    if os.path.lexists(path):
        root = path if os.path.isdir(path) else None
        return _without_companions(_expanded([path], follow_links), pool), root
    matches = glob.glob(path, recursive=True)
    if not follow_links:  # The user chose a named path, but not the files that a pattern matches.
        _refuse_links(matches)
    if not matches:
        raise _missing(given)
    return _without_companions(_expanded(matches, follow_links), pool), None


def _missing(given: str) -> UserError:
    return UserError("--input does not exist", given, "Give a file, a folder or a glob that matches files")


def _remote_paths(given: str) -> set[str]:
    """Objects of a bucket that `given` names, matches or contains; those of a folder as `_walk` filters them."""
    if objects := list_objects(given):
        return _inputs_below(given, objects)
    if exists(given):
        return {given}
    matches = {}
    if glob.has_magic(given):
        matches = with_retries(lambda: file_system(given).glob(given, detail=True), given)
    if not matches:
        raise _missing(given)
    paths: set[str] = set()
    for name, entry in matches.items():
        if "/." in name and "/." not in given:  # As for a local glob, "*" matches nothing hidden.
            continue
        path = f"{scheme_of(given)}://{name}"
        paths |= _inputs_below(path, list_objects(path)) if entry["type"] == "directory" else {path}
    return paths


def _inputs_below(folder: str, names: Iterable[str]) -> set[str]:
    """Paths of the objects in `folder` that may be inputs; "/" ends the name of a marker of an empty folder."""
    return {
        f"{folder.rstrip('/')}/{name}"
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
        and not name.lower().endswith((*_SKIPPED_SUFFIXES, "/"))
    }


def _expanded(matches: Sequence[str], follow_links: bool) -> set[str]:
    paths: set[str] = set()
    for match in matches:
        paths.update(_walk(match, follow_links) if os.path.isdir(match) else [match])
    return paths


def _without_companions(paths: set[str], pool: ThreadPoolExecutor) -> list[str]:
    """`paths` in order, without the files that img2dataset writes beside a tar, even if the tar is not among them."""
    tars = {path: _tars_of(path) for path in paths}
    folders = {posixpath.dirname(path) for path in paths if tars[path] and not paths.intersection(tars[path])}
    existing = paths.union(*pool.map(_listing, folders))
    return sorted(path for path in paths if not existing.intersection(tars[path]))


def _listing(folder: str) -> set[str]:
    with open_files.input_errors(folder):
        return {f"{folder}/{name}" for name in list_names(folder)}


def _tars_of(path: str) -> list[str]:
    """Tars for which img2dataset would write `path` as a table or statistics."""
    stems = [path.removesuffix(suffix) for suffix in ("_stats.json", ".json", ".parquet") if path.endswith(suffix)]
    return [stem + suffix for stem in stems for suffix in webdataset.SUFFIXES]


def _walk(folder: str, follow_links: bool) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            posixpath.join(parent, name)
            for name in names
            if not name.startswith(".") and not name.lower().endswith(_SKIPPED_SUFFIXES)
        ]
    if not follow_links:
        _refuse_links(paths, folder)
    return paths


def _refuse_links(paths: list[str], folder: str | None = None) -> None:
    """Raises `UserError` for a link to a file outside `folder`, by default the folder of the link."""
    for path in paths:
        if os.path.islink(path) and not os.path.isdir(path) and not is_inside(path, folder or os.path.dirname(path)):
            remedy = "Remove it, or give --follow-links to follow such links"
            raise UserError("--input has a link that leads out of its folder", path, remedy)


def _recognise(path: str) -> tuple[str, list[InputShard] | UserError] | None:
    """(format, shards or error) of the file at `path`; None if it is not an input."""
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        return None  # Opening a pipe would block forever.
    num_bytes = open_files.file_size(path)
    head = open_files.read_range(path, 0, _HEAD_BYTES)
    for name, input_format in FORMATS.items():
        if input_format.recognises(head, path):
            with open_files.input_errors(path):
                return name, input_format.shards(path, num_bytes)
    return None
