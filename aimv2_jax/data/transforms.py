"""From pictures to patches: crops, one resize, patches. Pillow and numpy.

B batch, L patches, P numbers a patch (row, column, channel), H and W pixels.
"""

from __future__ import annotations

import math

import einops
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

Box = tuple[int | float, int | float, int | float, int | float]
"""(left, top, right, bottom), in pixels."""


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
    """The largest centred square: to scale it is to scale the shorter side and cut, but cheap for 20000 x 1 pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resize(image: Image.Image, box: Box, size: int, mirrored: bool = False) -> UInt8[np.ndarray, "H W 3"]:
    """The part of `image` inside `box` as a square of `size` pixels: bicubic, antialiased (a = -0.5, Pillow's).

    `mirrored`: with left and right exchanged, which numpy takes ten times as long for as Pillow.
    """
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square)


def patchify(
    pixels: UInt8[np.ndarray, "H W 3"], patch_size: int, out: UInt8[np.ndarray, "L P"] | None = None
) -> UInt8[np.ndarray, "L P"]:
    """Row-major patches, each flattened in (row, column, channel) order; written to `out`, if given."""
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    if out is None:
        out = np.empty((rows * columns, 3 * patch_size**2), np.uint8)
    assert out.flags.c_contiguous, "to reshape it would be to copy it"
    # One copy, in runs of a patch's row.
    runs = pixels.reshape(rows, patch_size, columns, 3 * patch_size).swapaxes(1, 2)
    out.reshape(runs.shape)[...] = runs
    return out


def unpatchify(patches: UInt8[np.ndarray, "L P"], grid: tuple[int, int], patch_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture whose `patchify` is `patches`, of `grid` (rows, columns) patches."""
    return einops.rearrange(patches, "(h w) (p q c) -> (h p) (w q) c", h=grid[0], p=patch_size, q=patch_size)


def patch_coords(grid: tuple[int, int]) -> Int32[np.ndarray, "L 2"]:
    """(row, column) of each patch of a grid of (rows, columns), row-major."""
    return np.indices(grid, dtype=np.int32).reshape(2, -1).T.copy()
