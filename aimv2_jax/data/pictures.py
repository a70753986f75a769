"""Encoded pictures: opened by their header, decoded no further than a crop needs it. Pillow and simplejpeg.

A plain JPEG is decoded by simplejpeg, at 1/2, 1/4 or 1/8 of its size (in the inverse DCT) where the crop has pixels to
spare; everything else, and a JPEG that simplejpeg finds fault with, by Pillow. At full size both give the same pixels.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import Box, sides

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MiB of RGB.
FORMAT_OF = {  # Pillow's name by the file's suffix; None for pictures that are not decoded but dropped.
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": None,
    "tiff": None,
    "avif": None,
    "heic": None,
    "jxl": None,
}
FORMATS = tuple(dict.fromkeys(filter(None, FORMAT_OF.values())))

# Pixels that a scaled decode keeps a side for each one wanted. Measured over crops that were decoded scaled, against a
# full decode and the same resize, PSNR in dB, median / worst: 46.1 / 37.1 at 1.3, 45.3 / 36.2 at 1.2, 44.7 / 34.7 at
# 1.1 for sharp photographs of 288 to 384 pixels at 56 to 224; 52.1 / 44.1 at 1.3 for the pictures of
# experiments/benchmarks/input_rate.py, 1600 pixels at 224.
SPARE = 1.3
_SMALLEST_TARGET = 8  # Pixels: below, simplejpeg has several scales of one size.

_ORIENTATION_TAG = 0x0112


@dataclasses.dataclass(frozen=True)
class _Turn:
    """From a picture as it is stored to the picture as it is seen: axes exchanged, then left and right, top and bottom.

    `method` is that in one word of Pillow's.
    """

    method: Image.Transpose | None = None
    axes: bool = False
    across: bool = False
    down: bool = False

    def seen(self, image: Image.Image) -> Image.Image:
        return image if self.method is None else image.transpose(self.method)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        return (height, width) if self.axes else (width, height)

    def seen_box(self, box: Box, width: int, height: int) -> Box:
        """Where `box` of a stored picture of `width` x `height` is seen."""
        left, top, right, bottom = box
        if self.axes:
            left, top, right, bottom, width, height = top, left, bottom, right, height, width
        return self._mirrored((left, top, right, bottom), width, height)

    def stored_box(self, box: Box, width: int, height: int) -> Box:
        """Where `box` of a seen picture of `width` x `height` is stored."""
        left, top, right, bottom = self._mirrored(box, width, height)
        return (top, left, bottom, right) if self.axes else (left, top, right, bottom)

    def _mirrored(self, box: Box, width: int, height: int) -> Box:
        left, top, right, bottom = box
        if self.across:
            left, right = width - right, width - left
        if self.down:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


_UPRIGHT = _Turn()
_TURNS = {  # EXIF 2.3, tag 274.
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, across=True),
    3: _Turn(Image.Transpose.ROTATE_180, across=True, down=True),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, down=True),
    5: _Turn(Image.Transpose.TRANSPOSE, axes=True),
    6: _Turn(Image.Transpose.ROTATE_270, axes=True, across=True),
    7: _Turn(Image.Transpose.TRANSVERSE, axes=True, across=True, down=True),
    8: _Turn(Image.Transpose.ROTATE_90, axes=True, down=True),
}


class Picture:
    """An encoded picture, of which the header has been read (see `open_picture`).

    `size` is (width, height) as the picture is meant to be seen: EXIF orientation applied.
    """

    def __init__(self, data: bytes, image: Image.Image):
        self._data, self._image = data, image
        # A PNG is decoded here: its EXIF block may lie behind its pixels.
        self._turn = _TURNS.get(_orientation(image), _UPRIGHT)
        self.size = self._turn.seen_size(*image.size)

    def decode(self, box: Box, size: int | tuple[int, int]) -> tuple[Image.Image, Box]:
        """What it takes to scale `box` to `size` (see `transforms.resize`): an RGB image, and where in it the box lies.

        Raises:
          BadRecord: `undecodable_image`, also where the damage lies outside of the box.
        """
        if self._image.format in ("JPEG", "MPO") and self._image.mode in ("RGB", "L"):
            stored = self._turn.stored_box(box, *self.size)
            stored_size = self._turn.seen_size(*sides(size))  # Exchanging the axes undoes itself.
            try:
                image, stored = _decode_jpeg(self._data, self._image.size, stored, stored_size)
            except ValueError:
                pass  # An error or, of which many are harmless, a warning: Pillow's word counts.
            else:
                return self._turn.seen(image), self._turn.seen_box(stored, *image.size)
        return self.whole(), box

    def whole(self) -> Image.Image:
        """The picture as it is meant to be seen, in RGB: first frame, oriented, transparency on white.

        Raises:
          BadRecord: `undecodable_image`.
        """
        try:
            return as_seen(self._image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to.
            raise BadRecord("undecodable_image") from error


def as_seen(image: Image.Image) -> Image.Image:
    """An image of Pillow's as it is meant to be seen: oriented, in RGB, transparency on white."""
    return _TURNS.get(_orientation(image), _UPRIGHT).seen(_to_rgb(image))


def open_picture(data: bytes) -> Picture:
    """Reads the header of an encoded picture.

    Raises:
      BadRecord: `empty_image`, `oversized_image` (more than `MAX_PIXELS`) or `undecodable_image`.
    """
    return Picture(data, _open(data))


def image_size(data: bytes) -> tuple[int, int]:
    """`open_picture(data).size`, without the look that this takes behind the pixels of a PNG; raises the same."""
    with warnings.catch_warnings():  # Pillow's, of broken EXIF blocks and of size, which is judged here.
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.format == "PNG" and "exif" not in image.info:
            return image.size
        return _TURNS.get(_orientation(image), _UPRIGHT).seen_size(*image.size)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadRecord("empty_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("oversized_image") from error
    except MemoryError:
        raise
    except Exception as error:  # As in `Picture.whole`.
        raise BadRecord("undecodable_image") from error
    if math.prod(image.size) == 0:
        raise BadRecord("empty_image")
    if math.prod(image.size) > MAX_PIXELS:
        raise BadRecord("oversized_image")
    return image


def decode_image(data: bytes) -> Image.Image:
    """The whole of an encoded picture, see `Picture.whole`; raises `BadRecord` as `open_picture` and that do."""
    return open_picture(data).whole()


def _decode_jpeg(data: bytes, whole: tuple[int, int], box: Box, size: tuple[int, int]) -> tuple[Image.Image, Box]:
    """What `Picture.decode` gives, as stored; raises `ValueError` for what Pillow may see more mildly."""
    width, height = box[2] - box[0], box[3] - box[1]
    spare = min(have / max(want, _SMALLEST_TARGET) for have, want in zip((width, height), size)) / SPARE
    scale = next((scale for scale in (8, 4, 2) if spare >= scale), 1)
    smallest = {"min_width": -(-whole[0] // scale), "min_height": -(-whole[1] // scale)} if scale > 1 else {}
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=scale, **smallest)
    # Only the part that the resize looks at goes on to Pillow: cubic, so two pixels beside each one, of either size.
    left, right = _reach(box[0] / scale, box[2] / scale, size[0], pixels.shape[1])
    top, bottom = _reach(box[1] / scale, box[3] / scale, size[1], pixels.shape[0])
    # Decoding rounds the picture's size up, so the box is inside of it.
    inside = box[0] / scale - left, box[1] / scale - top, box[2] / scale - left, box[3] / scale - top
    return Image.fromarray(pixels[top:bottom, left:right]), inside


def _reach(start: float, stop: float, size: int, end: int) -> tuple[int, int]:
    margin = 2 * max(1.0, (stop - start) / size) + 1
    return max(0, math.floor(start - margin)), min(end, math.ceil(stop + margin))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A picture with a broken EXIF block is still a picture, upright as far as anyone knows.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, which Pillow would clip at 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" not in image.info and not image.mode.endswith(("A", "a")):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
