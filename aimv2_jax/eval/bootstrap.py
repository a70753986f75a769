"""The bootstrap over images of figures of sums. N images, R resamples.

A resample of N images draws each of them a number of times, and those numbers are multinomial: no image is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Num

RESAMPLES = 1000
_LIMITS_95 = (2.5, 97.5)


def resampled_sums(
    per_image: Num[np.ndarray, "N ..."], resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "R ..."]:
    """Sums of values over the images of each resample.

    The resamples depend on N, their number and the seed alone, so that two calls for the same images are paired.
    """
    count = len(per_image)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.tensordot(times.astype(np.float64), per_image.astype(np.float64), axes=1)


def limits_95(figures: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The limits of the middle 95 % of the figures of resamples."""
    low, high = np.percentile(figures, _LIMITS_95)
    return float(low), float(high)


def interval(per_image: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval over images of a `figure` of summed values.

    Args:
      per_image: [N, ...], values that are summed over the images of a resample.
      figure: maps [R, ...] sums to [R] figures.
      seed: of the resamples.
    """
    return limits_95(figure(resampled_sums(per_image, seed=seed)))
