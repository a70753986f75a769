"""Where crops and sliding windows of an image are, and how predictions of patches become predictions of pixels.

n windows, R x C patches of a window's grid, K outputs, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from aimv2_jax.data.transforms.geometry import Box

_BOX_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an image as the encoder sees it: `box` in the image's pixels, in `grid` = (rows, columns) patches."""

    box: Box
    grid: tuple[int, int]
    mirrored: bool = False


@dataclasses.dataclass(frozen=True)
class Side:
    """The part of one side of an image: from `start` to `end`, as shares of the side, in `patches`."""

    start: float
    end: float
    patches: int


def scaled_size(
    size: tuple[int, int], window: tuple[int, int], scale: float, own_size: bool = False
) -> tuple[float, float]:
    """(height, width) of an image of `size` that covers a window of (height, width), times `scale`.

    With `own_size` it is the image's own size times `scale`, unless that is too small to cover the window.
    """
    cover = max(window[0] / size[0], window[1] / size[1])
    factor = max(1.0, cover) if own_size else cover
    return size[0] * factor * scale, size[1] * factor * scale


def side_at(length: float, patches: int, patch_size: int, share: float) -> Side:
    """The part of a side of `length` pixels that `patches` patches cover, from a whole pixel at `share` of the room.

    A side that is shorter, or longer by less than half a patch, is taken as a whole, in as many patches as fit it best.
    """
    room = length - patches * patch_size
    if room < patch_size / 2:
        return Side(0.0, 1.0, min(patches, max(1, round(length / patch_size))))
    start = round(share * room) / length
    return Side(start, min(1.0, start + patches * patch_size / length), patches)


def sliding_sides(length: float, patches: int, patch_size: int, stride: float) -> list[Side]:
    """The parts of a side that sliding windows cover, in order; the last ends where the side does.

    Neighbours are at most `stride` of a window apart.
    """
    room, step = length - patches * patch_size, max(1.0, stride * patches * patch_size)
    if room < patch_size / 2:
        return [side_at(length, patches, patch_size, 0.0)]
    count = int(np.ceil(room / step - 1e-9)) + 1
    return [side_at(length, patches, patch_size, min(index * step, room) / room) for index in range(count)]


def box_of(size: tuple[int, int], rows: Side, columns: Side) -> Box:
    """The box of two sides in an image of (height, width) pixels; a box of whole pixels has no rounding errors."""
    height, width = size
    sides = columns.start * width, rows.start * height, columns.end * width, rows.end * height
    left, top, right, bottom = (round(side, _BOX_DIGITS) for side in sides)
    return left, top, right, bottom


def sliding_windows(
    size: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int,
    stride: float,
    scale: float = 1.0,
    own_size: bool = False,
    mirrored: bool = False,
) -> list[Window]:
    """The windows of `grid` patches that cover an image of (height, width) `size`, see `scaled_size`."""
    window = grid[0] * patch_size, grid[1] * patch_size
    height, width = scaled_size(size, window, scale, own_size)
    rows = sliding_sides(height, grid[0], patch_size, stride)
    columns = sliding_sides(width, grid[1], patch_size, stride)
    return [
        Window(box_of(size, row, column), (row.patches, column.patches), mirrored) for row in rows for column in columns
    ]


def interpolation(positions: Float[np.ndarray, " H"], patches: int, columns: int) -> Float[np.ndarray, "H {columns}"]:
    """Weights of the bilinear interpolation between the centres of `patches` patches, at `positions` in patches.

    A position before the first centre or beyond the last takes that patch alone; columns from `patches` on are zero.
    """
    inside = np.clip(positions - 0.5, 0, patches - 1)
    weights = np.maximum(0, 1 - np.abs(inside[:, None] - np.arange(columns)))
    weights[:, patches:] = 0
    return weights.astype(np.float32)


def window_weights(
    windows: Sequence[Window], size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Float[np.ndarray, "n H R"], Float[np.ndarray, "n W C"]]:
    """Interpolation weights from each window's patches to the rows and columns of an image of (height, width) `size`.

    The weights of a row or column outside a window are zero, so that a sum over windows adds those that cover a pixel.
    """
    height, width = size
    rows = np.zeros((len(windows), height, grid[0]), np.float32)
    columns = np.zeros((len(windows), width, grid[1]), np.float32)
    centres = np.arange(max(height, width)) + 0.5
    for index, window in enumerate(windows):
        left, top, right, bottom = window.box
        for weights, (start, end), patches, length, mirrored in (
            (rows[index], (top, bottom), window.grid[0], height, False),
            (columns[index], (left, right), window.grid[1], width, window.mirrored),
        ):
            inside = np.flatnonzero((centres[:length] >= start - 1e-6) & (centres[:length] <= end + 1e-6))
            positions = (centres[inside] - start) / (end - start) * patches
            positions = patches - positions if mirrored else positions
            weights[inside] = interpolation(positions, patches, weights.shape[1])
    return rows, columns
