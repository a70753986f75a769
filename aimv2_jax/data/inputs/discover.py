"""Which inputs there are: files, folders and globs, recognised by looking into them."""

from __future__ import annotations

import dataclasses
import glob
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from aimv2_jax.data.inputs import captions, files, parquet, webdataset
from aimv2_jax.data.locations import locate
from aimv2_jax.errors import UserError

_HEAD_BYTES = 64 << 10
_THREADS = 16  # A bucket answers many at once, each after many milliseconds.
# Not opened in folders, which may hold millions of them.
_PICTURES_AND_TEXTS = tuple(f".{suffix}" for suffix in (*webdataset.IMAGES, "txt", "arrayrecord"))
_LOOKED_FOR = (
    "It was looked for webdataset tars, parquet with a column of pictures, and .jsonl or .csv tables whose rows name "
    "their pictures by " + ", ".join(captions.IMAGES)
)


@dataclasses.dataclass(frozen=True)
class InputShard:
    """A part of the input that is read in one go: a tar, a parquet file, or rows of a table beside its pictures."""

    kind: str  # "webdataset", "parquet", "jsonl" or "csv"
    path: str  # absolute, or with its scheme
    num_bytes: int  # for captions with an estimate of their pictures
    start: int = 0  # rows; 0 and None mean the whole file
    stop: int | None = None


def find(inputs: Sequence[str]) -> list[InputShard]:
    """The shards of all `inputs` (PATHs and GLOBs, local or remote), each once, in the order of their paths.

    Raises:
      UserError: if one of `inputs` is not there, cannot be read or gives nothing, or a parquet table has no pictures.
    """
    found: dict[tuple[str, int], InputShard] = {}
    for given in inputs:
        paths = _candidates(given)
        with ThreadPoolExecutor(_THREADS) as pool:
            results = list(pool.map(_recognise, paths))
        shards = [shard for result in results if isinstance(result, list) for shard in result]
        kinds = {shard.kind for shard in shards}
        for path, refusal in zip(paths, results):
            # A table without pictures among tables with pictures is a mistake; among tars it is a list of them.
            if isinstance(refusal, UserError) and (not shards or _calls_itself(path, refusal) in kinds):
                raise refusal
        if not shards:
            raise UserError("--input has nothing that can be read", given, _LOOKED_FOR)
        found |= {(shard.path, shard.start): shard for shard in shards}
    unique: dict[tuple[str, int], InputShard] = {}
    # A file itself before links to it: what belongs to a tar lies beside it.
    for shard in sorted(found.values(), key=lambda shard: (shard.path != _real(shard.path), shard.path)):
        unique.setdefault((_real(shard.path), shard.start), shard)
    return sorted(unique.values(), key=lambda shard: (shard.path, shard.start))


def _calls_itself(path: str, refusal: UserError) -> str:
    """The kind of the file that was refused: parquet by its content, tables by their names."""
    suffix = posixpath.splitext(path)[1].lower().removeprefix(".")
    return "parquet" if refusal.what.startswith("parquet") else {"tsv": "csv"}.get(suffix, suffix)


def _real(path: str) -> str:
    """What tells a file from others, whatever links lead to it."""
    return path if files.is_remote(path) else os.path.realpath(path)


def _candidates(given: str) -> list[str]:
    """The files that `given` may mean, sorted."""
    if not given:  # An unset variable of the shell; as a path it would be the current folder.
        raise UserError("--input is empty", given, "Give a file, a folder or a glob")
    if files.is_remote(given):
        with files.remote_errors(given):
            return _expanded(given, [str(path) for path in _remote_glob(given)])
    path = os.path.abspath(locate(given))
    matches = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
    return _expanded(given, matches)


def _remote_glob(given: str) -> list[epath.Path]:
    path = epath.Path(given)
    if path.exists() or not glob.has_magic(given):
        return [path] if path.exists() else []
    scheme, _, rest = given.partition("://")
    bucket, _, pattern = rest.partition("/")
    return list(epath.Path(f"{scheme}://{bucket}").glob(pattern))


def _expanded(given: str, matches: list[str]) -> list[str]:
    if not matches:
        raise UserError("--input is not there", given, "Give a file, a folder or a glob that matches some")
    paths: set[str] = set()
    for match in matches:
        paths.update(_walk(match) if epath.Path(match).is_dir() else [match])
    return sorted(path for path in paths if not _belongs_to_tar(path))


def _walk(folder: str) -> list[str]:
    paths = []
    for parent, folders, names in epath.Path(folder).walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            posixpath.join(str(parent), name)
            for name in names
            if not name.startswith(".") and not name.lower().endswith(_PICTURES_AND_TEXTS)
        ]
    return paths


def _belongs_to_tar(path: str) -> bool:
    """Whether `path` is what img2dataset writes beside a tar: its table or its statistics."""
    for suffix in ("_stats.json", ".json", ".parquet"):
        if path.endswith(suffix):
            stem = path.removesuffix(suffix)
            if any(epath.Path(stem + tar).exists() for tar in webdataset.SUFFIXES):
                return True
    return False


def _recognise(path: str) -> list[InputShard] | UserError:
    """The shards of the file at `path`; an empty list if it is no input, an error if it is one without pictures."""
    if not files.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        return []  # To open a pipe would wait for ever.
    num_bytes = files.size(path)
    head = files.part(path, 0, _HEAD_BYTES)
    if parquet.recognises(head, path):
        return parquet.complaint(path, num_bytes) or [InputShard("parquet", path, num_bytes)]
    if webdataset.recognises(head, path):
        return [InputShard("webdataset", path, num_bytes)]
    kind = captions.recognise(head, path)
    if kind is None:
        return []
    refusal = captions.complaint(path, kind)
    if refusal is not None:
        return refusal
    return [InputShard(kind, path, size, start, stop) for start, stop, size in captions.chunks(path, kind, num_bytes)]
