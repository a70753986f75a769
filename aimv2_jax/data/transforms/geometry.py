"""Geometry from images to patches: crop, one resize, patchify. Pillow and numpy.

B batch, L patches, P values per patch (row, column, channel), H and W pixels, G grids.
"""

from __future__ import annotations

import functools
import math

import einops
import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from PIL import Image

Box = tuple[int | float, int | float, int | float, int | float]
"""(left, top, right, bottom), in pixels."""

_MAX_ASPECT_ERROR = 0.05  # See `fit_grid`.
_MIN_FILL = 0.8  # See `fit_grid`.
MAX_RESIZED_PIXELS = 1 << 24  # Pixels that `center_view` resizes before it crops: at 224, an image of aspect 334.


def crop_box(
    rng: np.random.Generator, width: int, height: int, area: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random crop by torchvision's rule (`RandomResizedCrop.get_params`).

    Its fraction of the image's area is uniform in `area`, its width / height log-uniform in `ratio`; after ten failed
    tries, the largest centred crop within `ratio`.
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


def center_view(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The centre square of an RGB image at `size`: the shorter side is resized to it, then the longer one is cropped.

    Bitwise equal to `CLIPImageProcessor` of transformers with Pillow, for any size and aspect: the longer side is
    rounded down, and so is the crop offset. torchvision's `Resize` and `CenterCrop` differ in the offset only: they
    round half to even, one pixel further when 3, 7, 11, ... pixels are cropped in total.
    """
    whole = resized_sides(image.size, size)
    left, top = ((side - size) // 2 for side in whole)
    if math.prod(whole) <= MAX_RESIZED_PIXELS:
        return np.asarray(image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))
    # Crops first; equal up to rounding. The cubic kernel reads two pixels on each side, at either scale.
    across, down = image.width / whole[0], image.height / whole[1]
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    image, box = cut(image, box, margin=2 * math.ceil(max(1, across, down)))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def resized_sides(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) of an image of `size` whose shorter side becomes `shorter`; the longer one is rounded down."""
    longer = shorter * max(size) // min(size)
    return (shorter, longer) if size[0] <= size[1] else (longer, shorter)


def fit_grid(width: int, height: int, area: int) -> tuple[int, int]:
    """(rows, columns) of patches for an image, at most `area` in total, that keep its aspect and fill the area.

    The grid with the most patches whose aspect is within 5 % of the image's. If there is none, or it fills less than
    80 % of the area, the grid with the least error among those that fill 80 % (RECIPE.md §9). The error is
    max(q, 1/q) - 1, q the ratio of the two aspects; ties go to the other measure, then to fewer rows.
    """
    rows, columns = _grids(area)
    patches, ratio = rows * columns, (columns * height) / (rows * width)
    error = np.maximum(ratio, 1 / ratio) - 1
    close = np.flatnonzero(error <= _MAX_ASPECT_ERROR)
    most = patches[close].max(initial=0)
    if most >= _MIN_FILL * area:
        best = close[patches[close] == most]
        best = best[np.lexsort((rows[best], error[best]))[0]]
    else:
        full = np.flatnonzero(patches >= _MIN_FILL * area)
        best = full[error[full] == error[full].min()]
        best = best[np.lexsort((rows[best], -patches[best]))[0]]
    return int(rows[best]), int(columns[best])


@functools.lru_cache(maxsize=16)
def _grids(area: int) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " G"]]:
    """Rows and columns of all grids with at most `area` patches."""
    counts = area // np.arange(1, area + 1)
    rows = np.repeat(np.arange(1, area + 1), counts)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    return rows, columns


def resize(
    image: Image.Image, box: Box, size: int | tuple[int, int], mirrored: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    """The part of `image` inside `box` at `size`, (width, height) or a square's side: bicubic, antialiased (a = -0.5).

    No pixel outside the box contributes, as if the crop were resized (torchvision's `resized_crop`); a pixel on the
    edge of the box contributes as a whole. `mirrored` flips left to right, which takes numpy ten times as long as
    Pillow.
    """
    image, box = cut(image, box)
    resized = image.resize(sides(size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else resized)


def cut(image: Image.Image, box: Box, margin: int = 0) -> tuple[Image.Image, Box]:
    """The pixels of `image` that `box` touches, with `margin` more on each side, and the box in their coordinates."""
    part = touched_inside(image.size, box, margin)
    if part != (0, 0, *image.size):
        image = image.crop(part)
    return image, moved(box, part)


def touched_inside(size: tuple[int, int], box: Box, margin: int = 0) -> tuple[int, int, int, int]:
    """The pixels of an image of (width, height) `size` that `box` touches, with `margin` more on each side."""
    left, top, right, bottom = touched(box)
    return max(0, left - margin), max(0, top - margin), min(size[0], right + margin), min(size[1], bottom + margin)


def moved(box: Box, part: Box) -> Box:
    """`box` in the coordinates of a part of the image."""
    left, top = part[:2]
    return box[0] - left, box[1] - top, box[2] - left, box[3] - top


def touched(box: Box) -> tuple[int, int, int, int]:
    """The smallest box of whole pixels around `box`."""
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height); an integer is the side of a square."""
    return (size, size) if isinstance(size, int) else size


def patchify(
    pixels: UInt8[np.ndarray, "H W 3"], patch_size: int, out: UInt8[np.ndarray, "L P"] | None = None
) -> UInt8[np.ndarray, "L P"]:
    """Row-major patches, each flattened in (row, column, channel) order; written to `out`, if given."""
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    if out is None:
        out = np.empty((rows * columns, 3 * patch_size**2), np.uint8)
    assert out.flags.c_contiguous, "reshape would copy"
    # A single copy whose elements are patch rows: with bytes as elements, it takes numpy four times as long.
    patch_row = np.dtype((np.void, 3 * patch_size))
    runs = pixels.reshape(rows, patch_size, -1).view(patch_row).swapaxes(1, 2)
    out.reshape(rows, columns, -1).view(patch_row)[...] = runs
    return out


def write_patches(
    pixels: UInt8[np.ndarray, "H W 3"],
    patch_size: int,
    patches: UInt8[np.ndarray, "L P"],
    coords: Int32[np.ndarray, "L 2"],
    valid: Bool[np.ndarray, " L"],
) -> None:
    """Writes an image to one row of a batch's arrays, which are zero; the patches after its last one stay padding."""
    grid = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    used = slice(grid[0] * grid[1])
    patchify(pixels, patch_size, out=patches[used])
    coords[used] = patch_coords(grid)
    valid[used] = True


def unpatchify(patches: UInt8[np.ndarray, "L P"], grid: tuple[int, int], patch_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image whose `patchify` is `patches`; `grid` is (rows, columns)."""
    return einops.rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=grid[0], p=patch_size, q=patch_size)


@functools.lru_cache(maxsize=256)
def patch_coords(grid: tuple[int, int]) -> Int32[np.ndarray, "L 2"]:
    """(row, column) of each patch of a grid of (rows, columns), row-major. Read-only."""
    coords = np.indices(grid, dtype=np.int32).reshape(2, -1).T.copy()
    coords.flags.writeable = False
    return coords
