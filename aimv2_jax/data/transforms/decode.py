"""Image decoding: reads the header first, and decodes only what a crop needs. Pillow and simplejpeg.

simplejpeg decodes a plain JPEG, at 1/2, 1/4 or 1/8 of its size (in the inverse DCT) if the crop has pixels to spare.
Pillow decodes everything else, and a JPEG that simplejpeg rejects. At full size both give the same pixels.

The conversion to RGB matches an image processor of transformers with Pillow that is given the path: an alpha channel is
dropped (as by torchvision's folders), a transparent colour becomes white. The exception is 16-bit grey, which is scaled
here and clipped there.
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
from aimv2_jax.data.transforms.decode_cost import check_cost
from aimv2_jax.data.transforms.geometry import Box, cut, sides, touched
from aimv2_jax.data.transforms.jpeg_header import plain_jpeg_size

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MiB of RGB.
_MAX_DECODE_BYTES = 1 << 30  # Memory while an image is decoded: 12 bytes per pixel at `MAX_PIXELS`.
# WebP needs two canvases, the frame and the image, each RGBA; other formats take at most 12 bytes.
_BYTES_PER_PIXEL = {"WEBP": 16}
# Pillow's format by file suffix; None for images that are dropped without decoding.
FORMAT_OF = {
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

# Minimum ratio of decoded to target pixels per side for a scaled decode. PSNR of scaled crops against a full decode and
# the same resize, in dB, median / worst: 46.1 / 37.1 at 1.3, 45.3 / 36.2 at 1.2, 44.7 / 34.7 at 1.1 for sharp
# photographs of 288 to 384 pixels at 56 to 224; 52.1 / 44.1 at 1.3 for the images of
# experiments/benchmarks/input_rate.py, 1600 pixels at 224.
SPARE = 1.3
_MIN_TARGET_PIXELS = 8  # Below this, several simplejpeg scales have the same size.

_BAND_PIXELS = 1 << 20
_ORIENTATION_TAG = 0x0112
_MAX_RLE_PIXELS = 4_000_000  # Pillow decodes a run-length BMP in Python, which takes a second for this size.


@dataclasses.dataclass(frozen=True)
class _Orientation:
    """EXIF orientation: the transform from stored to displayed image.

    `axes` swaps the axes, then `across` flips left to right and `down` top to bottom; `method` is Pillow's name for it.
    """

    method: Image.Transpose | None = None
    axes: bool = False
    across: bool = False
    down: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        return image if self.method is None else image.transpose(self.method)

    def displayed_size(self, width: int, height: int) -> tuple[int, int]:
        return (height, width) if self.axes else (width, height)

    def displayed_box(self, box: Box, width: int, height: int) -> Box:
        """Displayed coordinates of `box` in a stored image of `width` x `height`."""
        left, top, right, bottom = box
        if self.axes:
            left, top, right, bottom, width, height = top, left, bottom, right, height, width
        return self._mirrored((left, top, right, bottom), width, height)

    def stored_box(self, box: Box, width: int, height: int) -> Box:
        """Stored coordinates of `box` in a displayed image of `width` x `height`."""
        left, top, right, bottom = self._mirrored(box, width, height)
        return (top, left, bottom, right) if self.axes else (left, top, right, bottom)

    def _mirrored(self, box: Box, width: int, height: int) -> Box:
        left, top, right, bottom = box
        if self.across:
            left, right = width - right, width - left
        if self.down:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


_IDENTITY = _Orientation()
_ORIENTATIONS = {  # EXIF 2.3, tag 274.
    2: _Orientation(Image.Transpose.FLIP_LEFT_RIGHT, across=True),
    3: _Orientation(Image.Transpose.ROTATE_180, across=True, down=True),
    4: _Orientation(Image.Transpose.FLIP_TOP_BOTTOM, down=True),
    5: _Orientation(Image.Transpose.TRANSPOSE, axes=True),
    6: _Orientation(Image.Transpose.ROTATE_270, axes=True, across=True),
    7: _Orientation(Image.Transpose.TRANSVERSE, axes=True, across=True, down=True),
    8: _Orientation(Image.Transpose.ROTATE_90, axes=True, down=True),
}


class EncodedImage:
    """An encoded image whose header has been read (see `open_encoded`).

    `size` is the displayed (width, height): EXIF orientation applied.
    """

    def __init__(self, data: bytes, stored_size: tuple[int, int], exif: _Orientation, opened: Image.Image | None):
        self._data = data
        self._stored_size = stored_size
        self._exif = exif
        self._plain_jpeg = opened is None
        self._opened = opened
        self.size = exif.displayed_size(*stored_size)

    def decode(self, box: Box, size: int | tuple[int, int]) -> tuple[Image.Image, Box]:
        """Decodes what `geometry.resize` needs to scale `box` to `size`: an RGB image, and the box in its coordinates.

        The image is no larger than the box.

        Raises:
          BadRecord: `undecodable_image`, even if the damage is outside the box.
        """
        stored = self._exif.stored_box(box, *self.size)
        stored_size = self._exif.displayed_size(*sides(size))  # Swapping the axes is its own inverse.
        image, stored = self._decode(stored, _scale(stored, stored_size))
        return self._exif.apply(image), self._exif.displayed_box(stored, *image.size)

    def decode_full(self) -> Image.Image:
        """Decodes all pixels of the first frame, in RGB, with EXIF orientation applied.

        Raises:
          BadRecord: `undecodable_image`.
        """
        image, _ = self._decode((0, 0, *self._stored_size), scale=1)
        return self._exif.apply(image)

    def _decode(self, box: Box, scale: int) -> tuple[Image.Image, Box]:
        """`decode` in stored coordinates, at 1/`scale` for a plain JPEG."""
        if self._plain_jpeg:
            try:
                return _decode_jpeg(self._data, self._stored_size, box, scale)
            except ValueError:
                pass  # An error, or a warning, many of which are harmless: Pillow decides.
        try:
            # The reference is dropped here, so that Pillow's buffers are freed before the conversion allocates its own.
            image, self._opened = self._opened or _open(self._data), None
            image, box = cut(image, box)
            return _to_rgb(image), box
        except (MemoryError, BadRecord):
            raise
        except Exception as error:  # Pillow's decoders raise any exception for a broken file.
            raise BadRecord("undecodable_image") from error


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image in RGB, with EXIF orientation applied."""
    return _ORIENTATIONS.get(_orientation_tag(image), _IDENTITY).apply(_to_rgb(image))


def open_encoded(data: bytes) -> EncodedImage:
    """Reads the header of an encoded image.

    Raises:
      BadRecord: `empty_image`, `oversized_image` (more than `MAX_PIXELS` pixels, or than 1 GiB of memory can decode),
        `costly_image` (see `decode_cost`) or `undecodable_image`, which for a JPEG only `decode` may find.
    """
    size = plain_jpeg_size(data)
    if size is not None and math.prod(size) <= MAX_PIXELS:
        return EncodedImage(data, size, _IDENTITY, opened=None)
    image = _open(data)
    # Reading the EXIF block may decode a PNG, where it can follow the pixels: the first use takes this image.
    exif = _ORIENTATIONS.get(_orientation_tag(image), _IDENTITY)
    is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    return EncodedImage(data, image.size, exif, opened=None if is_plain_jpeg else image)


def image_size(data: bytes) -> tuple[int, int]:
    """`open_encoded(data).size`, without decoding a PNG to find its EXIF block; raises the same errors."""
    with warnings.catch_warnings():  # Pillow warns about broken EXIF blocks, and about sizes that `_open` checks.
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.format == "PNG" and "exif" not in image.info:
            return image.size
        return _ORIENTATIONS.get(_orientation_tag(image), _IDENTITY).displayed_size(*image.size)


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
    except Exception as error:  # See `EncodedImage._decode`.
        raise BadRecord("undecodable_image") from error
    pixels = math.prod(image.size)
    if pixels == 0:
        raise BadRecord("empty_image")
    if image.format == "BMP" and pixels > _MAX_RLE_PIXELS and image.tile and image.tile[0][0] == "bmp_rle":
        raise BadRecord("costly_image")
    if pixels > MAX_PIXELS or pixels * _BYTES_PER_PIXEL.get(image.format, 0) > _MAX_DECODE_BYTES:
        raise BadRecord("oversized_image")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Opens and fully decodes an encoded image; raises `BadRecord` like `open_encoded` and `decode_full`."""
    return open_encoded(data).decode_full()


def _scale(box: Box, size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 and 8 by which `box` can be reduced and still have `SPARE` times the pixels of `size`."""
    available = box[2] - box[0], box[3] - box[1]
    spare = min(side / max(target, _MIN_TARGET_PIXELS) for side, target in zip(available, size)) / SPARE
    return next((scale for scale in (8, 4, 2) if spare >= scale), 1)


def _decode_jpeg(data: bytes, stored_size: tuple[int, int], box: Box, scale: int) -> tuple[Image.Image, Box]:
    """See `EncodedImage._decode`; raises `ValueError` for faults, some of which Pillow tolerates."""
    smallest = (
        {"min_width": -(-stored_size[0] // scale), "min_height": -(-stored_size[1] // scale)} if scale > 1 else {}
    )
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_factor=scale, **smallest)
    scaled = tuple(side / scale for side in box)  # Decoding rounds the image size up, so the box is inside.
    left, top, right, bottom = touched(scaled)
    inside = scaled[0] - left, scaled[1] - top, scaled[2] - left, scaled[3] - top
    return Image.fromarray(pixels[top:bottom, left:right]), inside


def _orientation_tag(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # An image with a broken EXIF block is used as stored.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB in bands, because a conversion needs several times the memory of its input."""
    image.load()  # An RGB image, returned as it is, would stay undecoded.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rgb, rows = Image.new("RGB", image.size), max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        rgb.paste(_band_to_rgb(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return rgb


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey is scaled to 8 bits, rounded to nearest.
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if isinstance(image.info.get("transparency"), bytes):  # Pillow would warn about a palette with alpha.
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
