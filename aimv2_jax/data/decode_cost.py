"""Refuses images that are small as files and slow to decode, by a look at their blocks that costs next to nothing.

A progressive JPEG may repeat a scan of 127 bytes, each a pass over all pixels. Millions of empty segments, chunks or
comments, and filling between them, are read one by one in Python by Pillow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from aimv2_jax.data.records import BadRecord

MAX_SCANS = 128  # Of a JPEG: encoders write 1 to 12, scripts for the smallest file up to about 100.
_MIN_SCANS, _MAX_SCANNED_PIXELS = 16, 4_000_000_000  # Of large ones fewer, but not below that: 0.2 s for 89 million.
_MAX_BLOCKS = 4096  # Segments, chunks, comments, each of up to 12 us in Pillow; more where they are not small:
_BYTES_PER_BLOCK = 256
_MAX_FILLING = 1 << 16  # Bytes of a JPEG's header that belong to no segment; Pillow takes 0.6 s for a million.

_JPEG, _PNG, _GIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8"
# In the pixels of a JPEG a zero byte follows 0xFF, and restart markers stand alone; 0xFF before a marker is filling.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_FIRST_WITH_LENGTH = 0xC0
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def check_cost(data: bytes) -> None:
    """Raises `BadRecord("costly_image")` for an encoded image that takes longer to decode than its pixels explain."""
    if data.startswith(_JPEG):
        costly = _is_jpeg_costly(data)
    elif data.startswith(_PNG):
        costly = _is_png_costly(data)
    else:
        costly = data.startswith(_GIF) and _is_gif_costly(data)
    if costly:
        raise BadRecord("costly_image")


def _is_jpeg_costly(data: bytes) -> bool:
    """Whether it has too many scans or segments, or too much filling before its pixels (ITU-T T.81, annex B)."""
    position, segments, scans, filling = len(_JPEG) - 1, 0, 0, 0
    components, progressive, most_scans = 0, False, MAX_SCANS
    most_segments = _MAX_BLOCKS + len(data) // _BYTES_PER_BLOCK
    while True:
        end = len(data) if scans else position + _MAX_FILLING + 2
        found = _MARKER.search(data, position, end)
        if not found:
            return not scans and end < len(data)
        filling += 0 if scans else found.start() - position
        position, marker = found.end(), data[found.end() - 1]
        if scans and marker == _END_OF_IMAGE:  # Before the pixels, Pillow reads on.
            return False
        if marker < _FIRST_WITH_LENGTH or marker in (_START_OF_IMAGE, _END_OF_IMAGE):
            continue
        segments += 1
        if marker in _FRAMES:
            components, progressive = data[position + 7 : position + 8], marker in _PROGRESSIVE
            height, width = (int.from_bytes(data[position + at : position + at + 2]) for at in (3, 5))
            most_scans = min(MAX_SCANS, max(_MIN_SCANS, _MAX_SCANNED_PIXELS // max(1, height * width)))
        elif marker == _START_OF_SCAN:
            scans += 1
            one_scan = not progressive and data[position + 2 : position + 3] == components
            # Each scan has a marker, but not each such pair of bytes is one: a film may follow the photograph.
            if scans == 1 and (one_scan or data.count(b"\xff\xda", position) < most_scans):
                return False
        if scans > most_scans or segments > most_segments or filling > _MAX_FILLING:
            return True
        position += max(2, int.from_bytes(data[position : position + 2]))


def _is_png_costly(data: bytes) -> bool:
    """Whether it has too many chunks, of pixels or of anything else."""
    position = len(_PNG)
    for _ in range(_MAX_BLOCKS + len(data) // _BYTES_PER_BLOCK):
        if position + 8 > len(data) or data[position + 4 : position + 8] == b"IEND":
            return False
        position += 12 + int.from_bytes(data[position : position + 4])
    return True


def _is_gif_costly(data: bytes) -> bool:
    """Whether too many blocks come before its first frame; a comment's are each copied with all before it."""
    return next(itertools.islice(_gif_blocks(data), _MAX_BLOCKS, None), None) is not None


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Where each extension, each part of one, and each stray byte before the first frame begins."""
    position = 13 + (3 << (data[10] % 8 + 1) if data[10:11] > b"\x7f" else 0)  # After the header and the palette.
    while (kind := data[position : position + 1]) not in (b",", b";", b""):
        yield position
        position += 2 if kind == b"!" else 1
        while kind == b"!" and (size := data[position : position + 1]) > b"\0":
            yield position
            position += 1 + size[0]
