"""Members of a tar, as many as can be had: a damaged header costs its member, not the rest of the tar.

Python's tarfile takes a damaged header for the end. Here the next header in order is looked for, at any offset, since
a tar that lost or gained bytes is no longer cut in blocks of 512.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_NAMES = {"encoding": "utf-8", "errors": "backslashreplace"}  # Never fails, and keeps different names different.
# Headers that only say more about the member after them: GNU's long names and links, pax records.
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_PREFACES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX)
_MAX_PREFACES, _MAX_PREFACE_BYTES = 8, 1 << 20
_SEARCH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in the tar, whole as far as headers can tell: its bytes are `num_bytes` from `offset`."""

    name: str
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Gap:
    """Bytes that were passed over; `name` is the member they cost, where its header could be read."""

    name: str | None
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Header:
    name: str | None  # None: its preface is broken, and the name in the header itself is cut or none.
    is_file: bool
    offset: int  # Of the data.
    num_bytes: int


def scan(file: BinaryIO, num_bytes: int) -> Iterator[Member | Gap]:
    """The members in the `num_bytes` of `file`, in their order, and what had to be passed over.

    Takes blocks of zeros for padding wherever they stand, so that tars written one behind the other are read to the
    end. A member is given once what stands behind it is in order: if there is a header inside of it instead, bytes of
    it are missing, and reading goes on at that header.
    """
    at = start = 0  # `start`: where the header of the last member began.
    pending: Member | None = None  # That member, until what follows it is in order.
    while at < num_bytes:
        block = _read(file, at, BLOCK)
        if block == _ZEROS[: len(block)]:
            if not block:  # Shorter than it was said to be.
                break
            at += len(block)
            continue
        header = _header(file, at, num_bytes)
        if header is not None:
            if pending is not None:
                yield pending
            pending, start = None, at
            end = header.offset + header.num_bytes
            if end <= num_bytes:
                if header.name is None:
                    yield Gap(None, end - at)
                elif header.is_file:
                    pending = Member(header.name, header.offset, header.num_bytes)
                at = end + -header.num_bytes % BLOCK
                continue
            # The tar is cut, or the size untrue.
            at = _find_header(file, header.offset, num_bytes)
            yield Gap(header.name, at - start)
            continue
        resumed = _find_header(file, at + 1 if pending is None else pending.offset, num_bytes)
        if pending is not None and resumed < pending.offset + pending.num_bytes:
            yield Gap(pending.name, resumed - start)
        else:
            if pending is not None:
                yield pending
            if resumed > at:  # Not in the padding behind the member.
                yield Gap(None, resumed - at)
        pending, at = None, resumed
    if pending is not None:
        yield pending


def begins_with_header(data: bytes) -> bool:
    """Whether `data` begins as a tar does."""
    return _parse(data[:BLOCK]) is not None


def _read(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """The header in `block`, if its checksum is right and its numbers can be."""
    try:
        info = tarfile.TarInfo.frombuf(block, **_NAMES)
    except (tarfile.TarError, ValueError):
        return None
    return info if info.size >= 0 else None


def _header(file: BinaryIO, at: int, num_bytes: int) -> _Header | None:
    """The header at `at` with its prefaces; None if there is none in order."""
    prefaces, are_sound = b"", True
    for _ in range(_MAX_PREFACES):
        block = _read(file, at, BLOCK)
        info = _parse(block)
        if info is None:
            return None
        at += BLOCK
        if info.type not in _PREFACES:
            if not prefaces:
                return _described(info, at)
            described = _after_prefaces(prefaces + block) if are_sound else None
            if described is None:
                return dataclasses.replace(_described(info, at), name=None)
            return _described(described, at)
        padded = info.size + -info.size % BLOCK
        if info.size > _MAX_PREFACE_BYTES or at + padded > num_bytes:
            return None
        text = _read(file, at, padded)
        are_sound = are_sound and (info.type not in _PAX or _are_records(text[: info.size].rstrip(b"\0")))
        prefaces += block + text
        at += padded
    return None


def _described(info: tarfile.TarInfo, offset: int) -> _Header:
    # Links and folders have no data, whatever their headers say of a size. A sparse file's data are not its bytes.
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    is_file = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and info.sparse is None
    return _Header(info.name, is_file, offset, info.size if has_data else 0)


def _are_records(text: bytes) -> bool:
    """Whether `text` is pax records, "LENGTH KEY=VALUE" and a newline; tarfile passes over broken ones in silence."""
    at = 0
    while at < len(text):
        length, space, _ = text[at : at + 10].partition(b" ")
        end = at + int(length) if length.isdigit() and space else 0
        if not at < end <= len(text) or text[end - 1 : end] != b"\n" or b"=" not in text[at:end]:
            return False
        at = end
    return True


def _after_prefaces(blocks: bytes) -> tarfile.TarInfo | None:
    """The header at the end of `blocks` as tarfile reads it after the prefaces before it."""
    try:
        with tarfile.TarFile(fileobj=io.BytesIO(blocks), **_NAMES) as tar:
            info = tar.firstmember
    except (tarfile.TarError, ValueError, LookupError, RecursionError):
        return None
    return info if info is not None and info.size >= 0 else None


def _find_header(file: BinaryIO, start: int, num_bytes: int) -> int:
    """Where the first header in order at or after `start` begins; `num_bytes` if there is none."""
    at = start
    while at + BLOCK <= num_bytes:
        data = _read(file, at, _SEARCH_BYTES)
        found = data.find(_MAGIC, _MAGIC_OFFSET)
        while found >= 0:
            first = found - _MAGIC_OFFSET
            block = data[first : first + BLOCK]
            if len(block) < BLOCK:
                block = _read(file, at + first, BLOCK)
            if _parse(block) is not None:
                return at + first
            found = data.find(_MAGIC, found + 1)
        if len(data) < _SEARCH_BYTES:
            break
        # So far back that a magic cut at the end of `data` is seen whole.
        at += len(data) - _MAGIC_OFFSET - len(_MAGIC) + 1
    return num_bytes
