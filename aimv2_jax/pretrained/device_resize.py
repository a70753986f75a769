"""Resizes images on the devices, to the pixels that Pillow would give (`data/transforms/resampling.py`).

On a host, enlarging is most of the time that an image takes; on the devices it is a hundredth of an encoder's work.

B batch, H and W pixels of the result, h and w of the images before, O outputs and I inputs of a side, K weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from aimv2_jax.data.transforms.resampling import WEIGHT_BITS, Canvas, Unresized

_DIGIT_BITS = 8  # A weight is split into digits that bfloat16 holds exactly, as it holds a pixel.
_DIGITS = 3

Arrays = dict[str, np.ndarray]
"""pixels [B h w 3] uint8, and int32 rows_first [B H], rows_weights [B H K], columns_first [B W], columns_weights
[B W K]."""


def pack(images: Sequence[Unresized], canvas: Canvas, size: tuple[int, int], rows: int) -> Arrays:
    """The arrays of images whose results have at most (height, width) `size`; the rest of them is zero.

    Args:
      images: at most `rows` images.
      canvas: the size of the arrays.
      size: of the largest result.
      rows: B.
    """
    height, width = size
    # What is outside an image is multiplied by zero, so that nothing has to be written there.
    arrays = {"pixels": np.empty((rows, canvas.height, canvas.width, 3), np.uint8)}
    for side, length in (("rows", height), ("columns", width)):
        arrays[f"{side}_first"] = np.zeros((rows, length), np.int32)
        arrays[f"{side}_weights"] = np.zeros((rows, length, canvas.weights), np.int32)
    for row, image in enumerate(images):
        arrays["pixels"][row, : image.pixels.shape[0], : image.pixels.shape[1]] = image.pixels
        for side, taps in (("rows", image.rows), ("columns", image.columns)):
            outputs, weights = taps.weights.shape
            arrays[f"{side}_first"][row, :outputs] = taps.first
            arrays[f"{side}_weights"][row, :outputs, :weights] = taps.weights
    return arrays


def resized(arrays: dict[str, Array]) -> UInt8[Array, "B H W 3"]:
    """The images of `pack` at their size, bitwise as Pillow's; traced inside jit."""
    across = _sums(arrays["columns_first"], arrays["columns_weights"], arrays["pixels"].swapaxes(1, 2))
    return _sums(arrays["rows_first"], arrays["rows_weights"], across.swapaxes(1, 2))


def resized_patches(arrays: dict[str, Array], patch_size: int) -> UInt8[Array, "B L P"]:
    """The patches of `resized` in raster order, as `geometry.patchify`."""
    pixels = resized(arrays)
    return einops.rearrange(pixels, "b (r p) (c q) k -> b (r c) (p q k)", p=patch_size, q=patch_size)


def _sums(
    first: Int32[Array, "B O"], weights: Int32[Array, "B O K"], pixels: UInt8[Array, "B I N 3"]
) -> UInt8[Array, "B O N 3"]:
    """The weighted sums along one side, in whole numbers.

    The products of pixels and digits, and their sums over all pixels of a side, are below 2^24: float32 has them exact.
    """
    inputs = jnp.arange(pixels.shape[1])
    matrix = sum(
        jnp.where(first[..., None] + k == inputs, weights[..., k, None], 0) for k in range(weights.shape[-1])
    )  # [B O I]
    total = jnp.int32(1 << (WEIGHT_BITS - 1))
    for digit in range(_DIGITS):
        shifted = matrix >> (digit * _DIGIT_BITS)
        part = shifted if digit == _DIGITS - 1 else shifted & ((1 << _DIGIT_BITS) - 1)
        product = jnp.einsum(
            "boi,bink->bonk",
            part.astype(jnp.bfloat16),
            pixels.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
        total = total + (product.astype(jnp.int32) << (digit * _DIGIT_BITS))
    return (total >> WEIGHT_BITS).clip(0, 255).astype(jnp.uint8)
