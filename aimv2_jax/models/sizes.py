"""Sizes of the published models, in one table. Imports no jax, so that experiments may read it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, blocks and heads of a trunk, and the peak learning rate it is trained with."""

    width: int
    depth: int
    heads: int
    peak_lr: float


# RECIPE.md §1; head dimension 128 everywhere. The learning rate of `base` and the tiny ones is ours.
ENCODER_SIZES = {
    "base": Size(768, 12, 6, 1e-3),
    "large": Size(1024, 24, 8, 1e-3),
    "huge": Size(1536, 24, 12, 8e-4),
    "1b": Size(2048, 24, 16, 8e-4),
    "3b": Size(3072, 24, 24, 8e-4),
    # For laptops and tests: head dimension 64 and 16.
    "tiny": Size(192, 6, 3, 1e-3),
    "test": Size(32, 2, 2, 1e-3),
}


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """Hidden units of SwiGLU by the reference's rule: int(2/3 of 4 x width), rounded up to `multiple_of`."""
    hidden = int(2 * 4 * width / 3)
    return -(-hidden // multiple_of) * multiple_of
