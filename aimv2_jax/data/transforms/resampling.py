"""Pillow's bicubic resize of 8-bit images as weighted sums, for devices to compute (`pretrained/device_resize.py`).

Pillow resizes columns first and rows then, each to 8 bits: an output is the sum of a few neighbouring pixels, with
weights that are rounded to integers in units of 2^-22 (Pillow's Resample.c). The same integers give the same pixels.

H and W pixels of the result, h and w of the image, O outputs of a side, K weights of an output.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.geometry import Box

WEIGHT_BITS = 22
"""A weight of 1 is 2^22."""
_RADIUS = 2.0  # Pixels that the cubic kernel reaches on each side, at the scale of the smaller of the two images.
_A = -0.5  # Catmull-Rom's.


@dataclasses.dataclass(frozen=True)
class Taps:
    """Output o of a side is the sum over k of pixel `first[o] + k`, times `weights[o, k]` · 2^-22."""

    first: Int32[np.ndarray, " O"]
    weights: Int32[np.ndarray, "O K"]

    def __getitem__(self, outputs: slice) -> Taps:
        return Taps(self.first[outputs], self.weights[outputs])

    def moved(self, pixels: int) -> Taps:
        """The same taps of an image that begins `pixels` earlier."""
        return Taps(self.first + np.int32(pixels), self.weights)


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What the arrays of a device hold of an image: (height, width) pixels before its resize, K weights an output."""

    height: int
    width: int
    weights: int


@dataclasses.dataclass(frozen=True)
class Unresized:
    """An image before its resize: `pixels`, and the weighted sums of rows and columns that resize them."""

    pixels: UInt8[np.ndarray, "h w 3"]
    rows: Taps
    columns: Taps

    def mirrored(self) -> Unresized:
        """The same image, flipped left to right after its resize."""
        return dataclasses.replace(self, columns=self.columns[::-1])


def num_weights(scale: float) -> int:
    """K of a side that shrinks by `scale`, or grows (below 1)."""
    return 2 * math.ceil(_RADIUS * max(1.0, scale)) + 1


@functools.lru_cache(maxsize=256)
def bicubic_taps(length: int, start: float, end: float, outputs: int) -> Taps:
    """The taps that resize the pixels from `start` to `end` of a side of `length` pixels to `outputs`. Read-only."""
    # Pillow keeps the box in single precision, and computes in double.
    low, high = np.float32(start), np.float32(end)
    scale = float(high - low) / outputs
    stretch = max(1.0, scale)
    centres = float(low) + (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centres - _RADIUS * stretch + 0.5).astype(np.int64), 0)
    count = np.minimum((centres + _RADIUS * stretch + 0.5).astype(np.int64), length) - first
    offsets = np.arange(num_weights(scale))
    values = _cubic((first[:, None] + offsets - centres[:, None] + 0.5) * (1.0 / stretch))
    values[offsets >= count[:, None]] = 0.0
    total = np.zeros(outputs)
    for column in values.T:  # Added from left to right as in Pillow: another order rounds differently.
        total += column
    values /= np.where(total == 0, 1.0, total)[:, None]
    scaled = values * (1 << WEIGHT_BITS)
    weights = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)
    taps = Taps(first.astype(np.int32), weights)
    for array in (taps.first, taps.weights):
        array.flags.writeable = False
    return taps


def _cubic(distances: Float[np.ndarray, "O K"]) -> Float[np.ndarray, "O K"]:
    x = np.abs(distances)
    near, far = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def unresized(
    image: Image.Image, box: Box | None, size: int | tuple[int, int], mirrored: bool, canvas: Canvas
) -> Unresized:
    """The result of `geometry.resize`, or without `box` of `geometry.center_view`, still to be computed by a device.

    Args:
      image: an RGB image.
      box: the part of it; None: the centre square.
      size: of the result: (width, height), or a square's side.
      mirrored: whether the result is flipped left to right.
      canvas: what the device takes; an image that needs more is resized here.
    """
    part, rows, columns = _taps(image.size, box, size)
    across, down = part[2] - part[0], part[3] - part[1]
    weights = max(side.weights.shape[1] for side in (rows, columns))
    # `geometry.center_view` resizes an image this long after its crop, which gives other pixels at the edges.
    too_long = box is None and math.prod(geometry.resized_sides(image.size, size)) > geometry.MAX_RESIZED_PIXELS
    if too_long or down > canvas.height or across > canvas.width or weights > canvas.weights:
        result = _as_it_is(geometry.center_view(image, size) if box is None else geometry.resize(image, box, size))
    else:
        result = Unresized(np.asarray(geometry.cut(image, part)[0]), rows, columns)
    return result.mirrored() if mirrored else result


def _taps(image_size: tuple[int, int], box: Box | None, size: int | tuple[int, int]) -> tuple[Box, Taps, Taps]:
    """The box of whole pixels that the result needs, and the taps of its rows and columns."""
    if box is not None:
        part, (width, height) = geometry.touched_inside(image_size, box), geometry.sides(size)
        left, top, right, bottom = geometry.moved(box, part)
        columns = bicubic_taps(part[2] - part[0], left, right, width)
        return part, bicubic_taps(part[3] - part[1], top, bottom, height), columns
    assert isinstance(size, int)
    resized = geometry.resized_sides(image_size, size)
    columns, rows = (
        bicubic_taps(old, 0, old, new)[(new - size) // 2 : (new - size) // 2 + size]
        for old, new in zip(image_size, resized)
    )
    left, right = _needed(columns, image_size[0])
    top, bottom = _needed(rows, image_size[1])
    return (left, top, right, bottom), rows.moved(-top), columns.moved(-left)


def _as_it_is(pixels: UInt8[np.ndarray, "H W 3"]) -> Unresized:
    """An image that has its size already."""
    return Unresized(pixels, *(identity_taps(side) for side in pixels.shape[:2]))


def _needed(taps: Taps, length: int) -> tuple[int, int]:
    """The first pixel that has a weight, and the one after the last."""
    return int(taps.first[0]), min(length, int(taps.first[-1]) + taps.weights.shape[1])


@functools.lru_cache(maxsize=64)
def identity_taps(outputs: int) -> Taps:
    """Taps of a side that keeps its size."""
    return Taps(np.arange(outputs, dtype=np.int32), np.full((outputs, 1), 1 << WEIGHT_BITS, np.int32))
