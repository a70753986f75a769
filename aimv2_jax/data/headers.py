"""Pictures' sizes, from their headers: no pixel is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MiB of RGB.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_ORIENTATION_TAG = 0x0112
_LYING = (5, 6, 7, 8)  # The orientations that exchange width and height.


class BadHeader(ValueError):
    """No picture can come of this: `reason` is `empty_image`, `oversized_image` or `undecodable_image`."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, as the picture is meant to be seen.

    Raises:
      BadHeader: if it is none, has no pixels or more than `MAX_PIXELS`.
    """
    if not data:
        raise BadHeader("empty_image")
    try:
        with warnings.catch_warnings():  # Pillow's, of broken EXIF blocks and of size, which is judged below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                (width, height), lying = image.size, _orientation(image) in _LYING
    except Image.DecompressionBombError as error:
        raise BadHeader("oversized_image") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever a broken file leads it to.
        raise BadHeader("undecodable_image") from error
    if width * height == 0:
        raise BadHeader("empty_image")
    if width * height > MAX_PIXELS:
        raise BadHeader("oversized_image")
    return (height, width) if lying else (width, height)


def _orientation(image: Image.Image) -> int:
    # A PNG's EXIF block may stand behind its pixels, and getexif would decode all of them to look there.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A picture with a broken EXIF block is still a picture, upright as far as anyone knows.
        return 1
