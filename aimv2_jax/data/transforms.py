"""From encoded pictures to patches: decoding, crops, patches. Pillow and numpy.

B batch, L patches, P numbers a patch (row, column, channel), H and W pixels.
"""

from __future__ import annotations

import io
import math

import einops
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from aimv2_jax.data.headers import FORMATS, MAX_PIXELS
from aimv2_jax.data.records import BadRecord

Box = tuple[int | float, int | float, int | float, int | float]
"""(left, top, right, bottom), in pixels."""

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """The picture as it is meant to be seen, in RGB: first frame, EXIF orientation applied, transparency on white.

    Raises:
      BadRecord: `empty_image`, `oversized_image` (more than `MAX_PIXELS`) or `undecodable_image`.
    """
    if not data:
        raise BadRecord("empty_image")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_size(image.size)
            orientation = _ORIENTATIONS.get(_orientation(image))
            rgb = _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("oversized_image") from error
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to.
        raise BadRecord("undecodable_image") from error
    return rgb if orientation is None else rgb.transpose(orientation)


def _refuse_size(size: tuple[int, int]) -> None:
    if math.prod(size) == 0:
        raise BadRecord("empty_image")
    if math.prod(size) > MAX_PIXELS:
        raise BadRecord("oversized_image")


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


def crop_box(
    rng: np.random.Generator, width: int, height: int, area: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random crop by torchvision's rule (`RandomResizedCrop.get_params`).

    Its share of the picture's area is uniform in `area`, its width / height log-uniform in `ratio`; after ten tries
    that do not fit, the largest centred crop within `ratio`.
    """
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resize(image: Image.Image, box: Box, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The part of `image` inside `box` as a square of `size` pixels: bicubic, antialiased."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: int,
    area: tuple[float, float] = (0.4, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "H W 3"]:
    """A random part of `image` (see `crop_box`) as a square of `size` pixels."""
    return resize(image, crop_box(rng, *image.size, area, ratio), size)


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The shorter side scaled to `size` and the centre square cut out, in one step: 20000 x 1 pixels are cheap."""
    return resize(image, center_box(*image.size), size)


def flip(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Left and right exchanged."""
    return pixels[:, ::-1]


def patchify(pixels: UInt8[np.ndarray, "H W 3"], patch_size: int) -> UInt8[np.ndarray, "L P"]:
    """Row-major patches, each flattened in (row, column, channel) order."""
    return einops.rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: UInt8[np.ndarray, "L P"], grid: tuple[int, int], patch_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture whose `patchify` is `patches`, of `grid` (rows, columns) patches."""
    return einops.rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=grid[0], p=patch_size, q=patch_size)


def patch_coords(grid: tuple[int, int]) -> Int32[np.ndarray, "L 2"]:
    """(row, column) of each patch of a grid of (rows, columns), row-major."""
    return np.indices(grid, dtype=np.int32).reshape(2, -1).T.copy()
