"""Reader of image folders: `imagefolder:DIR`, whose subfolders are the classes (torchvision's ImageFolder).

A shard is a class folder, with the images of its subfolders, or the part of one that has many files. The images of DIR
itself, which have no class, are the shard `DIR/.`.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping

from aimv2_jax.data.transforms.decode import FORMAT_OF
from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import open_files
from aimv2_jax.prepare.inputs.samples import BadInput, InputShard, MapFile, Sample
from aimv2_jax.prepare.inputs.text_encoding import escape_name
from aimv2_jax.storage.bucket import check_scheme
from aimv2_jax.storage.files import is_remote, list_objects
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import is_inside

PREFIX = "imagefolder:"
FIELD = "class, the folder of the image; of --image, a folder with PNGs in the places of the images"
CAPTIONS = ()
CLASS = "class"
CHUNK_FILES = 10_000
KIND = "imagefolder"
_SUFFIXES = tuple(f".{suffix}" for suffix in FORMAT_OF)
_FILES_MEASURED = 8
# Names of class folders that are splits, if no folder has another name.
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev"))


def find(given: str, split: str | None, follow_links: bool) -> list[InputShard]:
    """Finds the shards of `given`, an input with `PREFIX`.

    Args:
      split: the subfolder whose folders are the classes, None for the folder itself.
      follow_links: follows links that lead out of the folder.

    Raises:
      UserError: if it is no folder, has no images, has a class without an image, or its folders are splits.
    """
    root = _root(given, split, follow_links)
    with open_files.input_errors(root):
        objects = list_objects(root) if is_remote(root) else None  # All at once: a request takes 50 ms.
        folders, others = _listing(root, objects)
        if objects is None and not follow_links:
            _refuse_links(root, folders)
        below = _by_folder(objects or {})
        files = {folder: _files(f"{root}/{folder}", below.get(folder))[0] for folder in folders}
        own = [name for name in others if _is_image(name)]
        empty = [folder for folder in folders if not files[folder]]
        if not own and len(empty) == len(folders):
            raise UserError("--input has no images", given, f"Give {PREFIX}DIR, with a folder of images for each class")
        if empty and len(empty) < len(folders):
            remedy = "Complete the download, or remove the folders"
            what = f"--input has {len(empty)} of {len(folders)} class folders without an image"
            raise UserError(what, f"{root}/{empty[0]}", remedy)
        if split is None and not own and _SPLITS.issuperset(name.lower() for name in folders):
            names = ", ".join(folders)
            raise UserError("the folders of --input are splits, not classes", f"{root}: {names}", "Give --split NAME")
        shards = [shard for name in folders if files[name] for shard in _shards(root, name, files[name], objects)]
        return shards + (_shards(root, ".", own, objects) if own else [])


def _root(given: str, split: str | None, follow_links: bool) -> str:
    name = given.removeprefix(PREFIX)
    check_scheme(name, "--input")
    if not name:
        raise UserError("--input names no folder", given, f"Give {PREFIX}DIR")
    root = name.rstrip("/") if is_remote(name) else os.path.abspath(resolve_path(name))
    if not is_remote(root) and not os.path.isdir(root):
        raise UserError("--input is no folder", given, f"Give {PREFIX}DIR, with a folder of images for each class")
    if split is None:
        return root
    with open_files.input_errors(root):
        folders, _ = _listing(root)
    if split not in folders:
        existing = ", ".join(folders[:10]) or "none"
        raise UserError("--input has no folder of the name --split", split, f"It has {existing}")
    if not is_remote(root) and not follow_links:
        _refuse_links(root, [split])
    return f"{root}/{split}"


def _refuse_links(root: str, folders: list[str]) -> None:
    for name in folders:
        path = f"{root}/{name}"
        if os.path.islink(path) and not is_inside(path, root):
            remedy = "Remove it, or give --follow-links to follow such links"
            raise UserError("--input has a link that leads out of its folder", path, remedy)


def _shards(root: str, folder: str, names: list[str], objects: Mapping[str, int] | None) -> list[InputShard]:
    """Shards of up to `CHUNK_FILES` images, with an estimate of their size from some of them."""
    measured = [posixpath.normpath(f"{folder}/{name}") for name in names[:: -(-len(names) // _FILES_MEASURED)]]
    sizes = [open_files.size_beside(root, path) if objects is None else objects[path] for path in measured]
    shards = []
    for start in range(0, len(names), CHUNK_FILES):
        stop = min(start + CHUNK_FILES, len(names))
        num_bytes = sum(sizes) * (stop - start) // len(sizes)
        shards.append(InputShard(KIND, f"{root}/{folder}", num_bytes, start, stop))
    return shards


def recognises(head: bytes, path: str) -> bool:
    """False: no file is an image folder."""
    return False


def shards(path: str, num_bytes: int) -> list[InputShard]:
    """A single file is no shard; see `find`."""
    return []


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str]:
    """The class, for images that have one."""
    return [] if _class(shard) is None else [CLASS]


def maps(shard: InputShard, wanted: Collection[str] = ()) -> list[str]:
    """Those of the `wanted` folders of second images that exist."""
    return [folder for folder in wanted if (bool(list_objects(folder)) if is_remote(folder) else os.path.isdir(folder))]


def classes(shard: InputShard) -> dict[str, tuple[str, ...]]:
    """The class of this shard; those of all shards are all classes, since none is empty."""
    name = _class(shard)
    return {} if name is None else {CLASS: (name,)}


def read(
    shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
) -> Iterator[Sample | BadInput]:
    """Yields the images of a shard by name, then its other files and links to folders, which are no samples.

    The second image in the folder `maps[i]` has the place that the image has in DIR, and the suffix .png.
    """
    root, folder = posixpath.split(shard.path)
    name = _class(shard)
    if name is None:
        images, others = sorted(filter(_is_image, _listing(root)[1])), []
    else:
        images, others = _files(shard.path)
        images, others = ([f"{folder}/{path}" for path in paths] for paths in (images, others))
    for path in images[shard.start : shard.stop]:
        map_path = f"{posixpath.splitext(path)[0]}.png"
        files = {field: MapFile(*open_files.read_or_reason(field, map_path, shard.follow_links)) for field in maps}
        data, absence = open_files.read_or_reason(root, path, shard.follow_links)
        yield Sample(escape_name(path), data, {} if name is None else {CLASS: name}, absence, files)
    if shard.start == 0:
        for path in others:
            yield BadInput("no_image_file", 0, open_files.size_beside(root, path), escape_name(path))


def _class(shard: InputShard) -> str | None:
    folder = posixpath.basename(shard.path)
    return None if folder == "." else escape_name(folder)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _listing(folder: str, objects: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files directly in a folder, without hidden ones.

    Args:
      objects: the objects below a folder of a bucket, if they are known already.
    """
    if is_remote(folder):
        names = [name for name in (list_objects(folder) if objects is None else objects) if not _is_hidden(name)]
        below = {name.partition("/")[0] for name in names if "/" in name}
        return sorted(below), sorted(name for name in names if "/" not in name)
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not _is_hidden(entry.name)]
    folders = sorted(entry.name for entry in visible if entry.is_dir())
    return folders, sorted(entry.name for entry in visible if not entry.is_dir())


def _files(folder: str, objects: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """Paths of the images below a folder, and of its other files and links to folders, sorted, without hidden ones."""
    if is_remote(folder):
        objects = list_objects(folder) if objects is None else objects
        paths = [name for name in objects if name and not _is_hidden(name) and not name.endswith("/")]
    else:
        paths = []
        for parent, folders, names in os.walk(folder):
            below = os.path.relpath(parent, folder)
            links = [name for name in folders if os.path.islink(f"{parent}/{name}")]
            folders[:] = [name for name in folders if not _is_hidden(name)]
            paths += [posixpath.normpath(f"{below}/{name}") for name in (*names, *links) if not _is_hidden(name)]
    return sorted(filter(_is_image, paths)), sorted(path for path in paths if not _is_image(path))


def _by_folder(objects: Iterable[str]) -> dict[str, list[str]]:
    """First folder -> paths in it, of those objects that are in a folder."""
    below: dict[str, list[str]] = {}
    for name in objects:
        folder, slash, path = name.partition("/")
        if slash:
            below.setdefault(folder, []).append(path)
    return below


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
