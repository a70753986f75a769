"""Next-patch predictions as images, in NumPy. L patches, M = L - 1 predicted, P pixel values per patch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

HIDDEN_OPACITY = 0.12  # Opacity of patches that the model has not seen, so that a viewer can still recognise them.


def denormalise(
    predicted: Float[np.ndarray, "M P"],
    patches: UInt8[np.ndarray, "L P"],
    mean: Sequence[float],
    std: Sequence[float],
    eps: float,
) -> UInt8[np.ndarray, "L P"]:
    """Predictions of patches 1 … L-1 as pixels, with the true mean and variance of each patch; patch 0 is unchanged.

    Inverts `losses.patch_targets` and `losses.normalise_pixels`: predicting the targets returns `patches`.
    """
    repeats = patches.shape[1] // len(mean)
    mean_P, std_P = np.tile(mean, repeats), np.tile(std, repeats)
    true = (patches[1:] / 255 - mean_P) / std_P
    scale = np.sqrt(true.var(axis=1, ddof=1, keepdims=True) + eps)
    pixels = ((predicted * scale + true.mean(axis=1, keepdims=True)) * std_P + mean_P) * 255
    return np.concatenate([patches[:1], np.clip(np.rint(pixels), 0, 255).astype(np.uint8)])


def fill_predictions(
    patches: UInt8[np.ndarray, "L P"], predicted: UInt8[np.ndarray, "L P"], prefix: int
) -> UInt8[np.ndarray, "L P"]:
    """The first `prefix` patches unchanged, the others as predicted."""
    return np.concatenate([patches[:prefix], predicted[prefix:]])


def fade_hidden(patches: UInt8[np.ndarray, "L P"], prefix: int) -> UInt8[np.ndarray, "L P"]:
    """The first `prefix` patches unchanged, the others nearly grey."""
    grey = 200 * (1 - HIDDEN_OPACITY) + HIDDEN_OPACITY * patches[prefix:]
    return np.concatenate([patches[:prefix], grey.astype(np.uint8)])
