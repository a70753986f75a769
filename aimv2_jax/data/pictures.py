"""Encoded pictures: opened by their header, decoded no further than a crop needs it. Pillow and simplejpeg.

A plain JPEG is decoded by simplejpeg, at 1/2, 1/4 or 1/8 of its size (in the inverse DCT) where the crop has pixels to
spare; everything else, and a JPEG that simplejpeg finds fault with, by Pillow. At full size both give the same pixels.

An image in RGB is what an image processor of transformers makes of it by Pillow, given its path: an alpha channel is
dropped (as by torchvision's folders, too), a transparent colour becomes white. Only 16-bit greys, which it clips, are
scaled.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from aimv2_jax.data.decode_cost import check_cost
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms import Box, cut, sides, touched

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MiB of RGB.
_MAX_BYTES = 1 << 30  # While an image is decoded: 12 bytes a pixel at that limit.
_BYTES_PER_PIXEL = {"WEBP": 16}  # Two canvases, the frame and the image, each RGBA; other formats take 12 at most.
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

_BAND_PIXELS = 1 << 20
_ORIENTATION_TAG = 0x0112
_MAX_RLE_PIXELS = 4_000_000  # Of a BMP with run lengths, which Pillow decodes in Python: a second for as many.


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
        self._data, self._stored_size = data, image.size
        self._plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        # A PNG is decoded here: its EXIF block may lie behind its pixels. So its first use has the image.
        self._turn = _TURNS.get(_orientation(image), _UPRIGHT)
        self._opened = None if self._plain_jpeg else image
        self.size = self._turn.seen_size(*image.size)

    def decode(self, box: Box, size: int | tuple[int, int]) -> tuple[Image.Image, Box]:
        """What it takes to scale `box` to `size` (see `transforms.resize`): an RGB image, and where in it the box lies.

        The image is no larger than the box.

        Raises:
          BadRecord: `undecodable_image`, also where the damage lies outside of the box.
        """
        stored = self._turn.stored_box(box, *self.size)
        stored_size = self._turn.seen_size(*sides(size))  # Exchanging the axes undoes itself.
        image, stored = self._decode(stored, _scale(stored, stored_size))
        return self._turn.seen(image), self._turn.seen_box(stored, *image.size)

    def whole(self) -> Image.Image:
        """The picture as it is meant to be seen, in RGB: every pixel of its first frame, oriented.

        Raises:
          BadRecord: `undecodable_image`.
        """
        image, _ = self._decode((0, 0, *self._stored_size), scale=1)
        return self._turn.seen(image)

    def _decode(self, box: Box, scale: int) -> tuple[Image.Image, Box]:
        """`decode` of a box of the stored picture, at 1/`scale` where it is a plain JPEG."""
        if self._plain_jpeg:
            try:
                return _decode_jpeg(self._data, self._stored_size, box, scale)
            except ValueError:
                pass  # An error or, of which many are harmless, a warning: Pillow's word counts.
        try:
            # Let go of here, so that Pillow's buffers are free before the conversion takes its own.
            image, self._opened = self._opened or _open(self._data), None
            image, box = cut(image, box)
            return _to_rgb(image), box
        except (MemoryError, BadRecord):
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to.
            raise BadRecord("undecodable_image") from error


def as_seen(image: Image.Image) -> Image.Image:
    """An image of Pillow's as it is meant to be seen: oriented, in RGB."""
    return _TURNS.get(_orientation(image), _UPRIGHT).seen(_to_rgb(image))


def open_picture(data: bytes) -> Picture:
    """Reads the header of an encoded picture.

    Raises:
      BadRecord: `empty_image`, `oversized_image` (more pixels than `MAX_PIXELS`, or than 1 GiB of memory can decode),
        `costly_image` (see `decode_cost`) or `undecodable_image`.
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
    check_cost(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("oversized_image") from error
    except MemoryError:
        raise
    except Exception as error:  # As in `Picture._decode`.
        raise BadRecord("undecodable_image") from error
    pixels = math.prod(image.size)
    if pixels == 0:
        raise BadRecord("empty_image")
    if image.format == "BMP" and pixels > _MAX_RLE_PIXELS and image.tile and image.tile[0][0] == "bmp_rle":
        raise BadRecord("costly_image")
    if pixels > MAX_PIXELS or pixels * _BYTES_PER_PIXEL.get(image.format, 0) > _MAX_BYTES:
        raise BadRecord("oversized_image")
    return image


def decode_image(data: bytes) -> Image.Image:
    """The whole of an encoded picture, see `Picture.whole`; raises `BadRecord` as `open_picture` and that do."""
    return open_picture(data).whole()


def _scale(box: Box, size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 and 8 at whose fraction `box` still has pixels to spare for `size`."""
    have = box[2] - box[0], box[3] - box[1]
    spare = min(side / max(wanted, _SMALLEST_TARGET) for side, wanted in zip(have, size)) / SPARE
    return next((scale for scale in (8, 4, 2) if spare >= scale), 1)


def _decode_jpeg(data: bytes, whole: tuple[int, int], box: Box, scale: int) -> tuple[Image.Image, Box]:
    """What `Picture._decode` gives; raises `ValueError` for what Pillow may see more mildly."""
    smallest = {"min_width": -(-whole[0] // scale), "min_height": -(-whole[1] // scale)} if scale > 1 else {}
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=scale, **smallest)
    scaled = tuple(side / scale for side in box)  # Decoding rounds the picture's size up, so the box is inside of it.
    left, top, right, bottom = touched(scaled)
    inside = scaled[0] - left, scaled[1] - top, scaled[2] - left, scaled[3] - top
    return Image.fromarray(pixels[top:bottom, left:right]), inside


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A picture with a broken EXIF block is still a picture, upright as far as anyone knows.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """In bands, since what a conversion takes in between is several times the image."""
    image.load()  # One that is RGB already would stay undecoded.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rgb, rows = Image.new("RGB", image.size), max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        rgb.paste(_band_to_rgb(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return rgb


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, scaled to the nearest of 8 bits.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if isinstance(image.info.get("transparency"), bytes):  # A palette with alpha, of which Pillow would warn.
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
