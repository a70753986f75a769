"""Pairs out of a tar: NAME.jpg, NAME.txt and NAME.json, in whatever order and however far apart.

The tar is read twice: its headers, which tell what belongs together, then sample by sample. So memory holds the index
(about a kilobyte a sample) and one sample, whatever the order and size of the tar.
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

from aimv2_jax.data.inputs import files, tars
from aimv2_jax.data.inputs.samples import MAX_SAMPLES, Damage, InputShard, Sample
from aimv2_jax.data.inputs.texts import parse_object, readable
from aimv2_jax.data.pictures import FORMAT_OF
from aimv2_jax.untrusted import as_int

FIELD = "txt, or json:NAME with a key of the .json"
CAPTIONS = ("txt", "json:caption")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
_UNPACK_BYTES = 64 << 10
_HEAD_BYTES = 8 << 20  # Some hundred pairs: what the fields are told by.
_JSONS_ASKED = 100


@dataclasses.dataclass(slots=True)
class _Stem:
    """The members of one sample."""

    key: str
    number: int = 0  # Of samples with this key before it.
    image: tars.Member | None = None
    txt: tars.Member | None = None
    json: tars.Member | None = None

    def members(self) -> list[tars.Member]:
        return [member for member in (self.image, self.txt, self.json) if member is not None]

    def is_whole(self) -> bool:
        return self.image is not None and len(self.members()) > 1


@dataclasses.dataclass
class _Index:
    stems: list[_Stem]
    lost: list[str]  # Keys of samples of which nothing but a name is left.
    num_bytes_lost: int
    aside: list[Damage]


def recognises(head: bytes, path: str) -> bool:
    """Whether `head` begins a tar, or `path` calls itself one, whatever became of it."""
    return tars.begins_with_header(_unpacked(head, tars.BLOCK)) or path.lower().endswith(SUFFIXES)


def shards(path: str, num_bytes: int) -> list[InputShard]:
    """The one that the tar is."""
    return [InputShard("webdataset", path, num_bytes)]


def read(shard: InputShard, fields: Collection[str] | None = None) -> Iterator[Sample | Damage]:
    """The samples of a tar in the order of their first members, with all their fields, then what was lost.

    With a NAME_stats.json beside the tar, samples given and lost are together as many as it announces. If there are
    more stems than that, those that come again and the least whole are taken for fragments and left out. Only if the
    tar is sound and has more pairs, by different names, the file is not believed: it was made for another tar.
    """
    with _open_tar(shard.path) as tar:
        file, num_bytes = tar.file, tar.num_bytes
        index = _index(file, num_bytes)
        stems, lost = index.stems, index.lost
        num_bytes_lost = index.num_bytes_lost + tar.num_packed_bytes_lost
        # Damage can repeat pairs, or tear them into several stems, but makes no new pair out of nothing.
        is_sound = not num_bytes_lost
        least = len({stem.key for stem in stems if stem.is_whole()}) if is_sound else 0
        announced, complaint = _announced(shard, least)
        if complaint is not None:
            yield complaint
        yield from index.aside
        if announced is not None:
            stems, fragments = _most_whole(stems, announced)
            yield from fragments
        for stem in stems:
            yield from _sample(file, stem)
    num_lost = len(lost) if announced is None else announced - len(stems)
    if num_lost or num_bytes_lost or not num_bytes:
        key = lost[0] if lost and num_lost else None
        yield Damage(tar.damage, num_lost, num_bytes_lost, key)


def fields(shard: InputShard, wanted: Collection[str] = ()) -> list[str] | None:
    """The fields that the first samples have, and of those that are `wanted` any that later ones have, too.

    None if there are no samples.
    """
    head = _unpacked(files.part(shard.path, 0, _HEAD_BYTES), _HEAD_BYTES)
    head_file = io.BytesIO(head)
    stems = _index(head_file, len(head)).stems
    found = _fields(head_file, stems, ())
    if _is_grouped(stems) and set(found).issuperset(wanted):
        return found
    with _open_tar(shard.path) as tar:  # All pictures may come first.
        stems = _index(tar.file, tar.num_bytes).stems
        return _fields(tar.file, stems, wanted) if stems else None


def _is_grouped(stems: list[_Stem]) -> bool:
    """Whether the members of a sample stand together in `stems`, the beginning of a tar, and one sample is whole."""
    offsets = sorted(sorted(member.offset for member in stem.members()) for stem in stems)
    are_apart = all(before[-1] < after[0] for before, after in itertools.pairwise(offsets))
    return are_apart and any(stem.is_whole() for stem in stems)


def _fields(file: BinaryIO, stems: list[_Stem], wanted: Collection[str]) -> list[str]:
    """The fields of the first of `stems`; it is looked on for those that are `wanted`."""
    found: dict[str, None] = {}  # In their order.
    num_jsons = 0
    for stem in stems:
        if stem.txt is not None:
            found["txt"] = None
        if stem.json is not None and (num_jsons < _JSONS_ASKED or not found.keys() >= set(wanted)):
            num_jsons += 1
            found |= {f"json:{name}": None for name in parse_object(_data(file, stem.json)) or {}}
    return list(found)


def _split(name: str) -> tuple[str, str]:
    """(key, kind) of the member `name`: the kind is "image", "txt", "json", or "" for what is none of ours."""
    stem, suffix = posixpath.splitext(name)
    suffix = suffix[1:].lower()
    if posixpath.basename(stem).startswith("."):  # What a Mac leaves beside files.
        return stem, ""
    kind = "image" if suffix in FORMAT_OF else suffix if suffix in ("txt", "json") else ""
    return stem.removeprefix("./"), kind


def _index(file: BinaryIO, num_bytes: int) -> _Index:
    """Which members make a sample: those of one stem; where a member's name comes again, another sample begins."""
    stems: dict[tuple[str, int], _Stem] = {}
    seen: dict[str, int] = {}
    begun: dict[str, None] = {}
    aside: list[Damage] = []
    num_bytes_lost = 0
    for item in tars.scan(file, num_bytes):
        key, kind = _split(item.name or "")
        if isinstance(item, tars.Gap) or (kind and item.num_bytes > files.MAX_FILE_BYTES):
            num_bytes_lost += item.num_bytes
            if kind:
                begun[key] = None
            continue
        if not kind:
            continue
        number = seen.get(item.name, 0)
        seen[item.name] = number + 1
        stem = stems.setdefault((key, number), _Stem(readable(key), number))
        if getattr(stem, kind) is None:
            setattr(stem, kind, item)
        else:
            aside.append(Damage("second_member", samples=0, num_bytes=item.num_bytes, key=stem.key))
    known = {key for key, _ in stems}
    lost = [readable(key) for key in begun if key not in known]
    return _Index(list(stems.values()), lost, num_bytes_lost, aside)


def _announced(shard: InputShard, least: int) -> tuple[int | None, Damage | None]:
    """How many samples the file of statistics beside the tar announces, if it is there and can be true: `least` are."""
    name = posixpath.basename(stem_of(shard.path)) + "_stats.json"
    try:
        tree = parse_object(files.read_beside(posixpath.dirname(shard.path), name, shard.follow_links)) or {}
        return as_int(tree.get("successes"), least, MAX_SAMPLES), None
    except files.NoFile as error:
        return None, None if error.reason == files.MISSING else Damage("wrong_stats", samples=0)
    except ValueError:
        return None, Damage("wrong_stats", samples=0)


def stem_of(path: str) -> str:
    """`path` without the suffix of a tar."""
    for suffix in SUFFIXES:
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


def _most_whole(stems: list[_Stem], number: int) -> tuple[list[_Stem], list[Damage]]:
    """The `number` of `stems` that are no repetitions and have most of what makes a pair; and what the others were."""
    if len(stems) <= number:
        return stems, []

    def rank(place: int) -> tuple[int, ...]:
        stem = stems[place]
        return stem.number, not stem.is_whole(), stem.image is None, -len(stem.members()), place

    kept = set(sorted(range(len(stems)), key=rank)[:number])
    fragments = [stem for place, stem in enumerate(stems) if place not in kept]
    return (
        [stem for place, stem in enumerate(stems) if place in kept],
        [Damage("fragment", 0, sum(m.num_bytes for m in stem.members()), stem.key) for stem in fragments],
    )


def _sample(file: BinaryIO, stem: _Stem) -> Iterator[Sample | Damage]:
    found: dict[str, Any] = {}
    if stem.txt is not None:
        found["txt"] = _data(file, stem.txt)
    if stem.json is not None:
        tree = parse_object(_data(file, stem.json))
        if tree is None:
            yield Damage("broken_json", samples=0, num_bytes=stem.json.num_bytes, key=stem.key)
        found |= {f"json:{name}": value for name, value in (tree or {}).items()}
    yield Sample(stem.key, _data(file, stem.image) if stem.image is not None else None, found)


def _data(file: BinaryIO, member: tars.Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.num_bytes)


class _Tar(NamedTuple):
    """A tar that can be read at any place."""

    file: BinaryIO
    num_bytes: int
    num_packed_bytes_lost: int = 0  # That could not be unpacked.
    damage: str = "damaged_tar"


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[_Tar]:
    """Opens a tar; a packed one is unpacked to a temporary file, up to `files.max_unpacked`."""
    with files.open_file(path) as packed:
        num_packed_bytes = packed.seek(0, io.SEEK_END)
        packed.seek(0)
        if packed.read(len(_GZIP)) != _GZIP:
            yield _Tar(packed, num_packed_bytes)
            return
        packed.seek(0)
        left = files.max_unpacked(num_packed_bytes)
        with files.temporary_file(path) as file:
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
                damage = "damaged_tar" if left else "decompression_bomb"
                yield _Tar(file, num_bytes, max(1, num_packed_bytes - packed.tell()), damage)


def _unpacked(head: bytes, num_bytes: int) -> bytes:
    """The beginning of what `head` holds: itself, or up to `num_bytes` of what it packs."""
    if not head.startswith(_GZIP):
        return head
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(head, num_bytes)
    except zlib.error:
        return b""
