"""Reader of webdataset tars: NAME.jpg, NAME.txt and NAME.json in any order and at any distance.

The tar is read twice: first its headers, which show which members belong together, then sample by sample. Memory thus
holds the index (about a kilobyte per sample) and one sample, for any order and size of the tar.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import posixpath
import zlib
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

from aimv2_jax.data.transforms.decode import FORMAT_OF
from aimv2_jax.prepare.inputs import open_files, tar_scan
from aimv2_jax.prepare.inputs.samples import MAX_SAMPLES, BadInput, InputShard, MapFile, Sample
from aimv2_jax.prepare.inputs.text_encoding import escape_name, parse_object
from aimv2_jax.untrusted import as_int

FIELD = "txt, or json:NAME with a key of the .json"
CAPTIONS = ("txt", "json:caption")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
_UNPACK_BYTES = 64 << 10
_HEAD_BYTES = 8 << 20  # About a hundred pairs, from which the fields are read.
_MAX_JSONS_PROBED = 100


@dataclasses.dataclass(slots=True)
class _Stem:
    """The members of one sample."""

    key: str
    number: int = 0  # Number of earlier samples with the same key.
    parts: dict[str, tar_scan.Member] = dataclasses.field(default_factory=dict)  # By kind, see `_split`.

    @property
    def image(self) -> tar_scan.Member | None:
        return self.parts.get("image")

    def members(self) -> list[tar_scan.Member]:
        return list(self.parts.values())

    def is_whole(self) -> bool:
        return self.image is not None and len(self.members()) > 1


@dataclasses.dataclass
class _Index:
    stems: list[_Stem]
    lost: list[str]  # Keys of samples that have only a readable name.
    num_bytes_lost: int
    ignored: list[BadInput]


def recognises(head: bytes, path: str) -> bool:
    """Whether a file is a tar by its first bytes `head`, or by the suffix of `path` even if damaged."""
    return tar_scan.begins_with_header(_unpack_head(head, tar_scan.BLOCK)) or path.lower().endswith(SUFFIXES)


def shards(path: str, num_bytes: int) -> list[InputShard]:
    """The tar as one shard."""
    return [InputShard("webdataset", path, num_bytes)]


def read(
    shard: InputShard, fields: Collection[str] | None = None, maps: Collection[str] = ()
) -> Iterator[Sample | BadInput]:
    """Yields the samples of a tar in the order of their first members, with all fields, then what was lost.

    With a NAME_stats.json beside the tar, the samples yielded and lost add up to the number that it announces. Surplus
    stems are treated as fragments and left out, repeated and least complete ones first. The file is ignored only if the
    tar is undamaged and has more pairs with different names: then it belongs to another tar.
    """
    with _open_tar(shard.path) as tar:
        file, num_bytes = tar.file, tar.num_bytes
        index = _index(file, num_bytes, maps)
        stems, lost = index.stems, index.lost
        num_bytes_lost = index.num_bytes_lost + tar.num_packed_bytes_lost
        # Damage can repeat pairs or split them into several stems, but cannot create new pairs.
        is_undamaged = not num_bytes_lost
        min_samples = len({stem.key for stem in stems if stem.is_whole()}) if is_undamaged else 0
        announced, bad_stats = _announced(shard, min_samples)
        if bad_stats is not None:
            yield bad_stats
        yield from index.ignored
        if announced is not None:
            stems, fragments = _drop_fragments(stems, announced)
            yield from fragments
        for stem in stems:
            yield from _sample(file, stem, maps)
    num_lost = len(lost) if announced is None else announced - len(stems)
    if num_lost or num_bytes_lost or not num_bytes:
        key = lost[0] if lost and num_lost else None
        yield BadInput(tar.reason, num_lost, num_bytes_lost, key)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Fields of the first samples, and `wanted` fields of any sample; None if there are no samples."""
    head = _unpack_head(open_files.read_range(shard.path, 0, _HEAD_BYTES), _HEAD_BYTES)
    head_file = io.BytesIO(head)
    stems = _index(head_file, len(head)).stems
    found = _fields(head_file, stems, ())
    if _is_grouped(stems) and set(found).issuperset(wanted):
        return found
    with _open_tar(shard.path) as tar:  # All images may precede the texts.
        stems = _index(tar.file, tar.num_bytes).stems
        return _fields(tar.file, stems, wanted) if stems else None


def _is_grouped(stems: list[_Stem]) -> bool:
    """Whether the members of each sample are adjacent in `stems`, the beginning of a tar, and one sample is whole."""
    offsets = sorted(sorted(member.offset for member in stem.members()) for stem in stems)
    are_apart = all(before[-1] < after[0] for before, after in itertools.pairwise(offsets))
    return are_apart and any(stem.is_whole() for stem in stems)


def _fields(file: BinaryIO, stems: list[_Stem], wanted: Collection[str]) -> list[str]:
    """Fields of the first of `stems`; the search continues while `wanted` fields are missing."""
    found: dict[str, None] = {}  # An ordered set.
    num_jsons = 0
    for stem in stems:
        if "txt" in stem.parts:
            found["txt"] = None
        if "json" in stem.parts and (num_jsons < _MAX_JSONS_PROBED or not found.keys() >= set(wanted)):
            num_jsons += 1
            found |= {f"json:{name}": None for name in parse_object(_data(file, stem.parts["json"])) or {}}
    return list(found)


def maps(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """Suffixes of images beside others, such as mask.png for NAME.mask.png; None if there are no samples."""
    with _open_tar(shard.path) as tar:
        names = [stem.image.name for stem in _index(tar.file, tar.num_bytes).stems if stem.image is not None]
    keys = {posixpath.splitext(name)[0] for name in names}
    dots = ((name, place) for name in names for place, letter in enumerate(name) if letter == ".")
    found = {
        name[place + 1 :]: None
        for name, place in dots
        if name[:place] in keys and name[:place] != posixpath.splitext(name)[0]
    }
    return list(found) if names else None


def classes(shard: InputShard) -> dict[str, tuple[str, ...]]:
    """Tars declare no classes."""
    return {}


def _split(name: str, maps: Collection[str]) -> tuple[str, str]:
    """(key, kind) of the member `name`: the kind is "image", "txt", "json", one of `maps`, or "" for other members."""
    for suffix in maps:
        if name.endswith(f".{suffix}"):
            return name.removeprefix("./").removesuffix(f".{suffix}"), suffix
    stem, suffix = posixpath.splitext(name)
    suffix = suffix[1:].lower()
    if posixpath.basename(stem).startswith("."):  # macOS adds such files.
        return stem, ""
    kind = "image" if suffix in FORMAT_OF else suffix if suffix in ("txt", "json") else ""
    return stem.removeprefix("./"), kind


def _index(file: BinaryIO, num_bytes: int, maps: Collection[str] = ()) -> _Index:
    """Groups members into samples by stem; a repeated member name begins another sample."""
    stems: dict[tuple[str, int], _Stem] = {}
    seen: dict[str, int] = {}
    begun: dict[str, None] = {}
    ignored: list[BadInput] = []
    num_bytes_lost = 0
    for item in tar_scan.scan(file, num_bytes):
        key, kind = _split(item.name or "", maps)
        if isinstance(item, tar_scan.Gap) or (kind and item.num_bytes > open_files.MAX_FILE_BYTES):
            num_bytes_lost += item.num_bytes
            if kind:
                begun[key] = None
            continue
        if not kind:
            continue
        number = seen.get(item.name, 0)
        seen[item.name] = number + 1
        stem = stems.setdefault((key, number), _Stem(escape_name(key), number))
        if kind not in stem.parts:
            stem.parts[kind] = item
        else:
            ignored.append(BadInput("second_member", samples=0, num_bytes=item.num_bytes, key=stem.key))
    known = {key for key, _ in stems}
    lost = [escape_name(key) for key in begun if key not in known]
    return _Index(list(stems.values()), lost, num_bytes_lost, ignored)


def _announced(shard: InputShard, min_samples: int) -> tuple[int | None, BadInput | None]:
    """Number of samples in the tar's statistics file, if it exists and is at least `min_samples`; or its error."""
    name = posixpath.basename(stem_of(shard.path)) + "_stats.json"
    try:
        tree = parse_object(open_files.read_beside(posixpath.dirname(shard.path), name, shard.follow_links)) or {}
        return as_int(tree.get("successes"), min_samples, MAX_SAMPLES), None
    except open_files.FileUnavailable as error:
        return None, None if error.reason == open_files.MISSING else BadInput("wrong_stats", samples=0)
    except ValueError:
        return None, BadInput("wrong_stats", samples=0)


def stem_of(path: str) -> str:
    """`path` without a tar suffix."""
    for suffix in SUFFIXES:
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


def _drop_fragments(stems: list[_Stem], number: int) -> tuple[list[_Stem], list[BadInput]]:
    """Keeps the `number` first and most complete of `stems`; returns these and the others as fragments."""
    if len(stems) <= number:
        return stems, []

    def rank(index: int) -> tuple[int, ...]:
        stem = stems[index]
        return stem.number, not stem.is_whole(), stem.image is None, -len(stem.members()), index

    kept = set(sorted(range(len(stems)), key=rank)[:number])
    fragments = [stem for index, stem in enumerate(stems) if index not in kept]
    return (
        [stem for index, stem in enumerate(stems) if index in kept],
        [BadInput("fragment", 0, sum(m.num_bytes for m in stem.members()), stem.key) for stem in fragments],
    )


def _sample(file: BinaryIO, stem: _Stem, maps: Collection[str]) -> Iterator[Sample | BadInput]:
    sample_fields: dict[str, Any] = {}
    if "txt" in stem.parts:
        sample_fields["txt"] = _data(file, stem.parts["txt"])
    if "json" in stem.parts:
        tree = parse_object(_data(file, stem.parts["json"]))
        if tree is None:
            yield BadInput("broken_json", samples=0, num_bytes=stem.parts["json"].num_bytes, key=stem.key)
        sample_fields |= {f"json:{name}": value for name, value in (tree or {}).items()}
    files = {field: MapFile(_data(file, stem.parts[field])) for field in maps if field in stem.parts}
    image = _data(file, stem.image) if stem.image is not None else None
    yield Sample(stem.key, image, sample_fields, maps=files)


def _data(file: BinaryIO, member: tar_scan.Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.num_bytes)


class _Tar(NamedTuple):
    """An unpacked, seekable tar."""

    file: BinaryIO
    num_bytes: int
    num_packed_bytes_lost: int = 0  # Packed bytes that could not be unpacked.
    reason: str = "damaged_tar"


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[_Tar]:
    """Opens a tar; a packed one is unpacked to a temporary file, up to `open_files.max_unpacked_bytes`."""
    with open_files.open_file(path) as packed:
        num_packed_bytes = packed.seek(0, io.SEEK_END)
        packed.seek(0)
        if packed.read(len(_GZIP)) != _GZIP:
            yield _Tar(packed, num_packed_bytes)
            return
        packed.seek(0)
        left = open_files.max_unpacked_bytes(num_packed_bytes)
        with open_files.temporary_file(path) as file:
            intact = True
            try:
                with gzip.GzipFile(fileobj=packed) as source:
                    while left > 0 and (data := source.read1(min(left, _UNPACK_BYTES))):
                        left -= file.write(data)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                intact = False
            num_bytes = file.tell()
            if intact and left:
                yield _Tar(file, num_bytes)
            else:
                reason = "damaged_tar" if left else "decompression_bomb"
                yield _Tar(file, num_bytes, max(1, num_packed_bytes - packed.tell()), reason)


def _unpack_head(head: bytes, num_bytes: int) -> bytes:
    """Returns `head` itself, or its first unpacked bytes, up to `num_bytes`, if it is gzip."""
    if not head.startswith(_GZIP):
        return head
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(head, num_bytes)
    except zlib.error:
        return b""
