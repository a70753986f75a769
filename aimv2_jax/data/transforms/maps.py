"""Decoding of the second images of a record: masks and depth maps, whose values are numbers and not colours."""

from __future__ import annotations

import io
import math

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.transforms.decode import MAX_PIXELS
from aimv2_jax.data.transforms.decode_cost import check_cost

_PNG = b"\x89PNG\r\n\x1a\n"
_MODES = {"1": np.uint8, "L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I": np.uint16}  # Pillow's -> type of values.


def decode_map(data: bytes) -> UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]:
    """Decodes a PNG with one value a pixel: uint8 for up to 8 bits, uint16 for 16 bits.

    The values are those of `numpy.asarray(PIL.Image.open(...))`: a palette gives its indices, one bit gives 0 and 1.
    Nothing is scaled or rotated: a grey of 16 bits stays as it is, where `decode_image` reduces it to 8.

    Raises:
      BadRecord: `empty_map`, `map_not_png` (JPEG and WebP change the values), `map_with_colours` (RGB, or an alpha
        channel), `oversized_map` (more than `MAX_PIXELS` pixels), `costly_image` or `undecodable_map`.
    """
    if not data:
        raise BadRecord("empty_map")
    if not data.startswith(_PNG):
        raise BadRecord("map_not_png")
    check_cost(data)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if math.prod(image.size) > MAX_PIXELS:
            raise BadRecord("oversized_map")
        dtype = _MODES.get(image.mode)
        if dtype is None:
            raise BadRecord("map_with_colours")
        return np.asarray(image).astype(dtype)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord("oversized_map") from error
    except (MemoryError, BadRecord):
        raise
    except Exception as error:  # Pillow's decoders raise any exception for a broken file.
        raise BadRecord("undecodable_map") from error
