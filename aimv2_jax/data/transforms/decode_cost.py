"""Cheap check for images that are small as files and slow to decode, from their block structure.

A progressive JPEG may repeat a scan of 127 bytes, each a pass over all pixels. Pillow reads millions of empty segments,
chunks or comments, and the fill bytes between them, one by one in Python.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from aimv2_jax.data.records import BadRecord

MAX_SCANS = 128  # Scans of a JPEG: encoders write 1 to 12, scripts for the smallest file up to about 100.
# A large JPEG may have fewer scans, but at least 16: one scan of 89 million pixels takes 0.2 s.
_MIN_SCANS = 16
_MAX_SCANNED_PIXELS = 4_000_000_000
# Segments, chunks or comments; each takes up to 12 us in Pillow. One more is allowed per 256 bytes of file.
_MAX_BLOCKS = 4096
_BYTES_PER_BLOCK = 256
_MAX_FILL_BYTES = 1 << 16  # Bytes of a JPEG header that belong to no segment; Pillow takes 0.6 s for a million.

_JPEG, _PNG, _GIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8"
# In JPEG pixel data a zero byte follows 0xFF, and restart markers have no length; 0xFF before a marker is fill.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_FIRST_WITH_LENGTH = 0xC0
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def check_cost(data: bytes) -> None:
    """Raises `BadRecord("costly_image")` for an image whose decoding time is out of proportion to its pixels."""
    if data.startswith(_JPEG):
        costly = _is_jpeg_costly(data)
    elif data.startswith(_PNG):
        costly = _is_png_costly(data)
    else:
        costly = data.startswith(_GIF) and _is_gif_costly(data)
    if costly:
        raise BadRecord("costly_image")


def _is_jpeg_costly(data: bytes) -> bool:
    """Whether a JPEG has too many scans or segments, or too much fill before its pixels (ITU-T T.81, annex B)."""
    position = len(_JPEG) - 1
    segments = scans = fill_bytes = 0
    components = b""
    progressive = False
    max_scans = MAX_SCANS
    max_segments = _MAX_BLOCKS + len(data) // _BYTES_PER_BLOCK
    while True:
        end = len(data) if scans else position + _MAX_FILL_BYTES + 2
        match = _MARKER.search(data, position, end)
        if not match:
            return not scans and end < len(data)
        fill_bytes += 0 if scans else match.start() - position
        position = match.end()
        marker = data[position - 1]
        if scans and marker == _END_OF_IMAGE:  # Pillow ignores this marker before the pixels.
            return False
        if marker < _FIRST_WITH_LENGTH or marker in (_START_OF_IMAGE, _END_OF_IMAGE):
            continue
        segments += 1
        if marker in _FRAMES:
            components, progressive = data[position + 7 : position + 8], marker in _PROGRESSIVE
            height, width = (int.from_bytes(data[position + at : position + at + 2]) for at in (3, 5))
            max_scans = min(MAX_SCANS, max(_MIN_SCANS, _MAX_SCANNED_PIXELS // max(1, height * width)))
        elif marker == _START_OF_SCAN:
            scans += 1
            single_scan = not progressive and data[position + 2 : position + 3] == components
            # Counts an upper bound: these bytes also occur elsewhere, as in a video that follows the photograph.
            if scans == 1 and (single_scan or data.count(b"\xff\xda", position) < max_scans):
                return False
        if scans > max_scans or segments > max_segments or fill_bytes > _MAX_FILL_BYTES:
            return True
        position += max(2, int.from_bytes(data[position : position + 2]))


def _is_png_costly(data: bytes) -> bool:
    """Whether a PNG has too many chunks of any kind."""
    position = len(_PNG)
    for _ in range(_MAX_BLOCKS + len(data) // _BYTES_PER_BLOCK):
        if position + 8 > len(data) or data[position + 4 : position + 8] == b"IEND":
            return False
        position += 12 + int.from_bytes(data[position : position + 4])
    return True


def _is_gif_costly(data: bytes) -> bool:
    """Whether a GIF has too many blocks before its first frame; Pillow copies a comment once per block of it."""
    return next(itertools.islice(_gif_blocks(data), _MAX_BLOCKS, None), None) is not None


def _gif_blocks(data: bytes) -> Iterator[int]:
    """Positions of the extensions, their sub-blocks, and stray bytes before the first frame."""
    position = 13 + (3 << (data[10] % 8 + 1) if data[10:11] > b"\x7f" else 0)  # Skips the header and the palette.
    while (kind := data[position : position + 1]) not in (b",", b";", b""):
        yield position
        position += 2 if kind == b"!" else 1
        while kind == b"!" and (size := data[position : position + 1]) > b"\0":
            yield position
            position += 1 + size[0]
