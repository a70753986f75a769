"""Fault-tolerant scan of a tar: a damaged header costs its member, not the rest of the tar.

Python's tarfile treats a damaged header as the end. This scan searches for the next valid header at any offset, because
the blocks of a tar that lost or gained bytes are no longer aligned to 512.
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
_NAMES = {"encoding": "utf-8", "errors": "backslashreplace"}  # Never fails, and different names stay different.
# Headers that extend the header of the next member: GNU's long names and links, pax records.
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_PREFACES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX)
_MAX_PREFACES, _MAX_PREFACE_BYTES = 8, 1 << 20
_MAX_SIZE_DIGITS = 18  # Digits of a size in a pax record.
_SUM_OFFSET, _SUM_BYTES = 148, 8  # Position of the checksum in a header.
_MIN_SEARCH_BYTES, _MAX_SEARCH_BYTES = 4 << 10, 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file in the tar that is complete according to the headers: `num_bytes` bytes from `offset`."""

    name: str
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Gap:
    """Skipped bytes; `name` is the lost member if its header could be read."""

    name: str | None
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Header:
    name: str | None  # None if a preface is broken: the header's own name is then truncated or empty.
    is_file: bool
    offset: int  # Start of the data.
    num_bytes: int


def scan(file: BinaryIO, num_bytes: int) -> Iterator[Member | Gap]:
    """Yields the members in the `num_bytes` of `file` in order, and the gaps that had to be skipped.

    Blocks of zeros count as padding at any position, so concatenated tars are read to the end. A member is yielded once
    the data after it is valid: a header found inside of a member means that bytes of it are missing, and the scan
    continues at that header. The time is proportional to `num_bytes` for any content.
    """
    # `start` is the offset of the last member's header, `num_zeros` the number of zero blocks before `at`.
    at = start = num_zeros = 0
    pending: Member | None = None  # The last member, until the data after it is known to be valid.
    while at < num_bytes:
        block = _read(file, at, BLOCK)
        if block == _ZEROS[: len(block)]:
            if not block:  # The file is shorter than `num_bytes`.
                break
            at += len(block)
            num_zeros += 1
            if num_zeros == 2 and pending is not None:  # Two zero blocks end a tar.
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
            # The tar is truncated, or the size is wrong.
            at = _find_header(file, header.offset, num_bytes)
            yield Gap(header.name, at - start)
            continue
        if last is not None:  # These are prefaces without a member; the member before them is complete.
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
            if resumed > at:  # The header is not in the padding after the member.
                yield Gap(None, resumed - at)
        pending, at = None, resumed
    if pending is not None:
        yield pending


def begins_with_header(data: bytes) -> bool:
    """Whether `data` begins with a valid tar header."""
    return _parse(data[:BLOCK]) is not None


def _read(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """Parses the header in `block`; None if its checksum or its numbers are invalid."""
    try:
        info = tarfile.TarInfo.frombuf(block, **_NAMES)
    except (tarfile.TarError, ValueError):
        return None
    return info if info.size >= 0 else None


def _header(file: BinaryIO, at: int, num_bytes: int) -> tuple[_Header | None, int | None]:
    """(header at `at` with its prefaces applied, or None if invalid; offset of the last valid header, or None)."""
    prefaces: list[tuple[bytes, int, int]] = []  # (type, offset of the text, size of the text).
    last = None
    for _ in range(_MAX_PREFACES):
        info = _parse(_read(file, at, BLOCK))
        if info is None:
            break
        last, at = at, at + BLOCK
        if info.type not in _PREFACES:
            # Texts are read only now; otherwise a chain of headers with long texts would be read once per header.
            texts = [(kind, _read(file, offset, size)) for kind, offset, size in prefaces]
            are_sound = _apply_prefaces(info, texts)
            header = _to_header(info, at)
            return header if are_sound else dataclasses.replace(header, name=None), last
        if info.size > _MAX_PREFACE_BYTES or at + info.size > num_bytes:
            break
        prefaces.append((info.type, at, info.size))
        at += info.size + -info.size % BLOCK
    return None, last


def _to_header(info: tarfile.TarInfo, offset: int) -> _Header:
    # Links and folders have no data, whatever size their headers have. The data of a sparse file is not its content.
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    is_file = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and info.sparse is None
    return _Header(info.name, is_file, offset, info.size if has_data else 0)


def _apply_prefaces(info: tarfile.TarInfo, texts: list[tuple[bytes, bytes]]) -> bool:
    """Applies the prefaces (type, text) to `info`; returns False if one of them is broken.

    tarfile can do the same, but takes hours for some texts of a megabyte (CVE-2024-6232).
    """
    for kind, text in reversed(texts):  # The first of contradicting prefaces wins.
        if kind == tarfile.GNUTYPE_LONGNAME:
            info.name = text.partition(b"\0")[0].decode(**_NAMES)
        if kind not in _PAX:
            continue
        records = _pax_records(text.rstrip(b"\0"))
        if records is None:
            return False
        if kind == tarfile.XGLTYPE:  # A global header applies to the whole tar and sets no names or sizes.
            continue
        if b"path" in records:
            info.name = records[b"path"].decode(**_NAMES)
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > _MAX_SIZE_DIGITS:
                return False
            info.size = int(records[b"size"])
        if any(key.startswith(b"GNU.sparse.") for key in records):
            info.sparse = []
    return True


def _pax_records(text: bytes) -> dict[bytes, bytes] | None:
    """Parses pax records ("LENGTH KEY=VALUE" and a newline each) to KEY -> VALUE; None if one of them is broken."""
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
    """Offset of the first valid header at or after `start`; `num_bytes` if there is none."""
    at, num_starts = start, _MIN_SEARCH_BYTES
    while at + BLOCK <= num_bytes:
        data = _read(file, at, num_starts - 1 + BLOCK)
        for first in _checksum_matches(data):
            if _parse(data[first : first + BLOCK]) is not None:
                return at + first
        if len(data) < num_starts - 1 + BLOCK:
            break
        at += num_starts
        num_starts = min(2 * num_starts, _MAX_SEARCH_BYTES)
    return num_bytes


def _checksum_matches(data: bytes) -> list[int]:
    """Offsets in `data` of blocks with the magic and a matching checksum; takes a few ms per megabyte."""
    matches = re.finditer(_MAGIC, data)
    starts = np.array([match.start() - _MAGIC_OFFSET for match in matches], np.int64)
    starts = starts[(starts >= 0) & (starts <= len(data) - BLOCK)]
    if not starts.size:
        return []
    view = np.frombuffer(data, np.uint8)
    # The checksum is the sum of the bytes, which some programs treat as signed, with its own 8 bytes as spaces.
    totals, highs = (np.concatenate([[0], np.cumsum(of, dtype=np.int64)]) for of in (view, view > 127))
    fields = view[starts[:, None] + _SUM_OFFSET + np.arange(_SUM_BYTES)]
    unsigned = totals[starts + BLOCK] - totals[starts] - fields.sum(1, dtype=np.int64) + _SUM_BYTES * ord(" ")
    signed = unsigned - 256 * (highs[starts + BLOCK] - highs[starts])
    stated = np.zeros_like(starts)
    has_begun, has_ended, is_cut, is_wrong = np.zeros((4, len(starts)), bool)
    for digits in fields.T:  # The field holds spaces, an octal number and spaces; a zero byte ends it early.
        is_cut |= digits == 0
        is_digit = (digits >= ord("0")) & (digits <= ord("7")) & ~is_cut
        is_blank = (digits == ord(" ")) & ~is_cut
        stated = np.where(is_digit, 8 * stated + digits - ord("0"), stated)
        is_wrong |= has_ended & is_digit | ~(is_digit | is_blank | is_cut)
        has_ended |= has_begun & is_blank
        has_begun |= is_digit
    return starts[~is_wrong & ((stated == unsigned) | (stated == signed))].tolist()
