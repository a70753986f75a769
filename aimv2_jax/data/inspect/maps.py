"""Second images of a record (masks, depth maps) as pixels of a contact sheet. H and W pixels, N images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8, UInt16

from aimv2_jax.data.inspect.sheet import fitted_values
from aimv2_jax.data.records import BadRecord, Record
from aimv2_jax.data.transforms.maps import decode_map
from aimv2_jax.plotting import Pixels, class_colours, depth_colours

_GAP = 4  # Pixels between an image and its maps.


def map_pixels(values: UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"], greatest: int) -> Pixels:
    """Values of 8 bits in the colours of classes; those of 16 bits dark where they are near `greatest`, 0 in grey."""
    if values.dtype == np.uint8:
        return class_colours()[values]
    return depth_colours(values / max(1, greatest), values > 0)


def drawn_maps(record: Record, greatest: dict[str, int]) -> tuple[list[Pixels], list[str]]:
    """The record's second images that can be decoded, fitted like its image, and a line about each of them all.

    Args:
      record: the record.
      greatest: the greatest value of each name in the dataset.
    """
    drawn, lines = [], []
    for name, data in record.images.items():
        try:
            values = decode_map(data)
        except BadRecord as error:
            lines.append(f"{name}: {error.reason}")
            continue
        drawn.append(map_pixels(fitted_values(values), greatest.get(name, int(values.max()))))
        lines.append(f"{name}: {8 * values.itemsize} bits, values from {values.min()} to {values.max()}")
    return drawn, lines


def side_by_side(images: Sequence[Pixels]) -> Pixels:
    """The images from left to right on white."""
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] for image in images) + _GAP * (len(images) - 1)
    row, left = np.full((height, width, 3), 255, np.uint8), 0
    for image in images:
        row[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + _GAP
    return row
