"""Members of a tar, as many as can be had: a damaged header costs its member, not the rest of the tar.

Python's tarfile takes a damaged header for the end. Here the next header in order is looked for, at any offset, since
a tar that lost or gained bytes is no longer cut in blocks of 512.
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_NAMES = {"encoding": "utf-8", "errors": "backslashreplace"}  # Never fails, and keeps different names different.
# Headers that only say more about the member after them: GNU's long names and links, pax records.
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_PREFACES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX)
_MAX_PREFACES, _MAX_PREFACE_BYTES = 8, 1 << 20
_MAX_DIGITS = 18  # Of a size in a pax record.
_SUM_OFFSET, _SUM_BYTES = 148, 8  # Of a header's checksum.
_MIN_SEARCH_BYTES, _MAX_SEARCH_BYTES = 4 << 10, 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
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
    it are missing, and reading goes on at that header. It takes time in proportion to `num_bytes`, whatever they are.
    """
    at = start = num_zeros = 0  # `start`: where the header of the last member began; `num_zeros`: blocks before `at`.
    pending: Member | None = None  # That member, until what follows it is in order.
    while at < num_bytes:
        block = _read(file, at, BLOCK)
        if block == _ZEROS[: len(block)]:
            if not block:  # Shorter than it was said to be.
                break
            at += len(block)
            num_zeros += 1
            if num_zeros == 2 and pending is not None:  # As a tar ends.
                yield pending
                pending = None
            continue
        num_zeros = 0
        header, last = _header(file, at, num_bytes)
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
        if last is not None:  # Prefaces of no member; what stands before them is whole.
            if pending is not None:
                yield pending
            pending = None
        searched = pending.offset if pending is not None else 1 + (at if last is None else last)
        resumed = _find_header(file, searched, num_bytes)
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


def _header(file: BinaryIO, at: int, num_bytes: int) -> tuple[_Header | None, int | None]:
    """(the header at `at` with its prefaces, None if there is none in order; where the last block in order begins)."""
    prefaces: list[tuple[bytes, int, int]] = []  # Their type, and where the text is and its bytes.
    last = None
    for _ in range(_MAX_PREFACES):
        info = _parse(_read(file, at, BLOCK))
        if info is None:
            break
        last, at = at, at + BLOCK
        if info.type not in _PREFACES:
            # Read no sooner: where many headers claim long texts, each would be read for all that come before it.
            texts = [(kind, _read(file, offset, size)) for kind, offset, size in prefaces]
            are_sound = _apply_prefaces(info, texts)
            header = _described(info, at)
            return header if are_sound else dataclasses.replace(header, name=None), last
        if info.size > _MAX_PREFACE_BYTES or at + info.size > num_bytes:
            break
        prefaces.append((info.type, at, info.size))
        at += info.size + -info.size % BLOCK
    return None, last


def _described(info: tarfile.TarInfo, offset: int) -> _Header:
    # Links and folders have no data, whatever their headers say of a size. A sparse file's data are not its bytes.
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    is_file = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and info.sparse is None
    return _Header(info.name, is_file, offset, info.size if has_data else 0)


def _apply_prefaces(info: tarfile.TarInfo, texts: list[tuple[bytes, bytes]]) -> bool:
    """Puts into `info` what the (type, text) of the prefaces before it say; False if one of them is broken.

    tarfile can do that, too, but takes hours over some texts of a megabyte (CVE-2024-6232).
    """
    for kind, text in reversed(texts):  # Of those that contradict each other, the first counts.
        if kind == tarfile.GNUTYPE_LONGNAME:
            info.name = text.partition(b"\0")[0].decode(**_NAMES)
        if kind not in _PAX:
            continue
        records = _pax_records(text.rstrip(b"\0"))
        if records is None:
            return False
        if kind == tarfile.XGLTYPE:  # Of the whole tar, where neither names nor sizes belong.
            continue
        if b"path" in records:
            info.name = records[b"path"].decode(**_NAMES)
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > _MAX_DIGITS:
                return False
            info.size = int(records[b"size"])
        if any(key.startswith(b"GNU.sparse.") for key in records):
            info.sparse = []
    return True


def _pax_records(text: bytes) -> dict[bytes, bytes] | None:
    """KEY -> VALUE of pax records, "LENGTH KEY=VALUE" and a newline each; None if one of them is broken."""
    records, at = {}, 0
    while at < len(text):
        length, space, _ = text[at : at + 10].partition(b" ")
        end = at + int(length) if length.isdigit() and space else 0
        if not at < end <= len(text) or text[end - 1 : end] != b"\n":
            return None
        key, equals, value = text[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals:
            return None
        records[key] = value
        at = end
    return records


def _find_header(file: BinaryIO, start: int, num_bytes: int) -> int:
    """Where the first header in order at or after `start` begins; `num_bytes` if there is none."""
    at, num_starts = start, _MIN_SEARCH_BYTES
    while at + BLOCK <= num_bytes:
        data = _read(file, at, num_starts - 1 + BLOCK)
        for first in _summed_right(data):
            if _parse(data[first : first + BLOCK]) is not None:
                return at + first
        if len(data) < num_starts - 1 + BLOCK:
            break
        at += num_starts
        num_starts = min(2 * num_starts, _MAX_SEARCH_BYTES)
    return num_bytes


def _summed_right(data: bytes) -> list[int]:
    """Where in `data` blocks begin that have the magic, and a checksum that is theirs; a megabyte takes some ms."""
    found = re.finditer(_MAGIC, data)
    starts = np.array([match.start() - _MAGIC_OFFSET for match in found], np.int64)
    starts = starts[(starts >= 0) & (starts <= len(data) - BLOCK)]
    if not starts.size:
        return []
    view = np.frombuffer(data, np.uint8)
    # The sum is of the bytes, by some programs of signed ones, with spaces for the eight of the sum itself.
    totals, highs = (np.concatenate([[0], np.cumsum(of, dtype=np.int64)]) for of in (view, view > 127))
    fields = view[starts[:, None] + _SUM_OFFSET + np.arange(_SUM_BYTES)]
    unsigned = totals[starts + BLOCK] - totals[starts] - fields.sum(1, dtype=np.int64) + _SUM_BYTES * ord(" ")
    signed = unsigned - 256 * (highs[starts + BLOCK] - highs[starts])
    stated = np.zeros_like(starts)
    has_begun, has_ended, is_cut, is_wrong = np.zeros((4, len(starts)), bool)
    for digits in fields.T:  # Spaces, an octal number, spaces; or cut by a zero before the end.
        is_cut |= digits == 0
        is_digit = (digits >= ord("0")) & (digits <= ord("7")) & ~is_cut
        is_blank = (digits == ord(" ")) & ~is_cut
        stated = np.where(is_digit, 8 * stated + digits - ord("0"), stated)
        is_wrong |= has_ended & is_digit | ~(is_digit | is_blank | is_cut)
        has_ended |= has_begun & is_blank
        has_begun |= is_digit
    return starts[~is_wrong & ((stated == unsigned) | (stated == signed))].tolist()
