"""Sizes of the published models, in one table. Imports no jax, so that experiments may read it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, blocks and heads of a trunk."""

    width: int
    depth: int
    heads: int


# RECIPE.md §1 [P, R]; 128 channels a head. Below "base" they are ours, of 64 a head: for two CPU cores.
ENCODER_SIZES = {
    "nano": Size(64, 4, 1),
    "micro": Size(128, 4, 2),
    "tiny": Size(192, 6, 3),
    "base": Size(768, 12, 6),
    "large": Size(1024, 24, 8),
    "huge": Size(1536, 24, 12),
    "1b": Size(2048, 24, 16),
    "3b": Size(3072, 24, 24),
}


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """Hidden units of SwiGLU by the reference's rule: int(2/3 of 4 x width), rounded up to `multiple_of`."""
    hidden = int(2 * 4 * width / 3)
    return -(-hidden // multiple_of) * multiple_of


def kept_rows(share: float, length: int) -> int:
    """Encoder rows of `length` that the decoder is given: the nearest whole number to the share, at least one."""
    return max(1, round(share * length))
