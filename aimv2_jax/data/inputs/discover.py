"""Which inputs there are: files, folders and globs, recognised by looking into them."""

from __future__ import annotations

import dataclasses
import glob
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from etils import epath

from aimv2_jax.data.inputs import files, tables, webdataset
from aimv2_jax.data.inputs.kinds import KINDS
from aimv2_jax.data.inputs.samples import InputShard
from aimv2_jax.data.locations import locate
from aimv2_jax.data.pictures import FORMAT_OF
from aimv2_jax.errors import UserError
from aimv2_jax.untrusted import is_inside

_HEAD_BYTES = 64 << 10
_THREADS = 64  # A bucket answers many at once, each after many milliseconds.
# Not opened in folders, which may hold millions of them.
_PICTURES_AND_TEXTS = tuple(f".{suffix}" for suffix in (*FORMAT_OF, "txt", "arrayrecord"))
_LOOKED_FOR = (
    "It was looked for webdataset tars, parquet with a column of pictures, and .jsonl or .csv tables whose rows name "
    "their pictures by " + ", ".join(tables.IMAGES)
)


def find(inputs: Sequence[str], follow_links: bool = False) -> list[InputShard]:
    """The shards of all `inputs` (PATHs and GLOBs, local or remote), each once, in the order of their paths.

    Args:
      follow_links: takes what links in a local folder lead to outside of it.

    Raises:
      UserError: if one of `inputs` is not there, cannot be read or gives nothing, a parquet table has no pictures, or a
        link in a folder is not to be followed.
    """
    found: dict[tuple[str, int], InputShard] = {}
    for given in inputs:
        with ThreadPoolExecutor(_THREADS) as pool:
            answers = pool.map(_recognise, _candidates(given, pool, follow_links))
            results = [answer for answer in answers if answer is not None]
        shards = [shard for _, answer in results if isinstance(answer, list) for shard in answer]
        kinds = {shard.kind for shard in shards}
        for kind, answer in results:
            # A table without pictures among tables with pictures is a mistake; among tars it is a list of them.
            if isinstance(answer, UserError) and (not shards or kind in kinds):
                raise answer
        if not shards:
            raise UserError("--input has nothing that can be read", given, _LOOKED_FOR)
        found |= {(s.path, s.start): dataclasses.replace(s, follow_links=follow_links) for s in shards}
    unique: dict[tuple[str, int], InputShard] = {}
    # A file itself before links to it: what belongs to a tar lies beside it.
    for shard in sorted(found.values(), key=lambda shard: (shard.path != _real(shard.path), shard.path)):
        unique.setdefault((_real(shard.path), shard.start), shard)
    return sorted(unique.values(), key=lambda shard: (shard.path, shard.start))


def _real(path: str) -> str:
    """What tells a file from others, whatever links lead to it."""
    return path if files.is_remote(path) else os.path.realpath(path)


def _candidates(given: str, pool: ThreadPoolExecutor, follow_links: bool) -> list[str]:
    """The files that `given` may mean, sorted."""
    if not given:  # An unset variable of the shell; as a path it would be the current folder.
        raise UserError("--input is empty", given, "Give a file, a folder or a glob")
    if files.is_remote(given):
        with files.remote_errors(given):
            return _expanded(given, [str(path) for path in _remote_glob(given)], pool, follow_links)
    path = os.path.abspath(locate(given))
    if os.path.lexists(path):
        return _expanded(given, [path], pool, follow_links)
    matches = glob.glob(path, recursive=True)
    if not follow_links:  # What a user names may be a link; what a pattern finds is as little his as a folder's files.
        _refuse_links(matches)
    return _expanded(given, matches, pool, follow_links)


def _remote_glob(given: str) -> list[epath.Path]:
    path = epath.Path(given)
    if path.exists():
        return [path]
    if not glob.has_magic(given):
        return []
    scheme, _, rest = given.partition("://")
    bucket, _, pattern = rest.partition("/")
    return list(epath.Path(f"{scheme}://{bucket}").glob(pattern))


def _expanded(given: str, matches: list[str], pool: ThreadPoolExecutor, follow_links: bool) -> list[str]:
    if not matches:
        raise UserError("--input is not there", given, "Give a file, a folder or a glob that matches some")
    paths: set[str] = set()
    for match, is_folder in zip(matches, pool.map(_is_folder, matches)):
        paths.update(_walk(match, follow_links) if is_folder else [match])
    # What img2dataset writes beside a tar belongs to it, whether or not the tar is given too.
    tars = {path: _tars_of(path) for path in paths}
    folders = {posixpath.dirname(path) for path in paths if tars[path] and not paths.intersection(tars[path])}
    there = paths.union(*pool.map(_listing, folders))
    return sorted(path for path in paths if not there.intersection(tars[path]))


def _is_folder(path: str) -> bool:
    return epath.Path(path).is_dir()


def _listing(folder: str) -> set[str]:
    return files.asked(folder, lambda: {str(path) for path in epath.Path(folder).iterdir()})


def _tars_of(path: str) -> list[str]:
    """The tars beside which img2dataset would write `path`, its table or its statistics."""
    stems = [path.removesuffix(suffix) for suffix in ("_stats.json", ".json", ".parquet") if path.endswith(suffix)]
    return [stem + suffix for stem in stems for suffix in webdataset.SUFFIXES]


def _walk(folder: str, follow_links: bool) -> list[str]:
    paths = []
    for parent, folders, names in epath.Path(folder).walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            posixpath.join(str(parent), name)
            for name in names
            if not name.startswith(".") and not name.lower().endswith(_PICTURES_AND_TEXTS)
        ]
    if not (follow_links or files.is_remote(folder)):
        _refuse_links(paths, folder)
    return paths


def _refuse_links(paths: list[str], folder: str | None = None) -> None:
    """Raises `UserError` for a link to a file that is not in `folder`, by default the one that the link lies in."""
    for path in paths:
        if os.path.islink(path) and not os.path.isdir(path) and not is_inside(path, folder or os.path.dirname(path)):
            remedy = "Remove it, or give --follow-links to take what links lead to"
            raise UserError("--input has a link that leads out of its folder", path, remedy)


def _recognise(path: str) -> tuple[str, list[InputShard] | UserError] | None:
    """The kind of the file at `path`, with its shards or what is wrong with it; None if it is no input."""
    if not files.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        return None  # To open a pipe would wait for ever.
    num_bytes = files.size(path)
    head = files.part(path, 0, _HEAD_BYTES)
    for name, kind in KINDS.items():
        if kind.recognises(head, path):
            return name, files.asked(path, partial(kind.shards, path, num_bytes))
    return None
