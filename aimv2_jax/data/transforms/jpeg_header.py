"""Size of a JPEG from its header, for the common case in which nothing else of the header matters.

Pillow's way to open a file costs as much as a twentieth of decoding a small photograph.
"""

from __future__ import annotations

# Segments that change neither the displayed size nor the cost of decoding: JFIF, Adobe, tables, comments. An EXIF or
# XMP block (APP1) may turn the image, and APP2 may hold further images beside a colour profile, which is not used.
_PLAIN_SEGMENTS = frozenset({0xE0, 0xEE, 0xFE, 0xDB, 0xC4, 0xDD})
_APP2, _ICC_PROFILE = 0xE2, b"ICC_PROFILE\0"
_BASELINE_FRAMES = frozenset({0xC0, 0xC1})
_START_OF_SCAN = 0xDA
_MAX_SEGMENTS = 64  # Encoders write about ten.
_PRECISION_BITS = 8
_GREY, _COLOUR = 1, 3


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a baseline JPEG in grey or three colours, with one scan and no EXIF or XMP block.

    None for all other files, which may be valid. Segments follow ITU-T T.81, annex B.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    position = 2
    frame = None
    for _ in range(_MAX_SEGMENTS):
        if data[position : position + 1] != b"\xff" or len(data) < position + 4:
            return None
        marker, start = data[position + 1], position + 4
        position += 2 + int.from_bytes(data[position + 2 : start])
        if marker == _START_OF_SCAN:
            # One scan has all components of the frame.
            return frame[:2] if frame and data[start : start + 1] == bytes([frame[2]]) else None
        if marker in _BASELINE_FRAMES:
            frame = _read_frame(data[start:position])
            if frame is None:
                return None
        elif marker not in _PLAIN_SEGMENTS and not (marker == _APP2 and data.startswith(_ICC_PROFILE, start)):
            return None
    return None


def _read_frame(segment: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) of a frame header; None if it is unusual."""
    if len(segment) < 6 or segment[0] != _PRECISION_BITS:
        return None
    height, width, components = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5]), segment[5]
    if not width or not height or components not in (_GREY, _COLOUR) or len(segment) != 6 + 3 * components:
        return None
    return width, height, components
