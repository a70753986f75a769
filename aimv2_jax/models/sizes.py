"""Sizes of the published models. Does not import jax, so that experiment files can use it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, blocks and heads of a trunk."""

    width: int
    depth: int
    heads: int


# RECIPE.md §1 [P, R], with 128 channels per head. Sizes below "base" are ours, with 64 per head, for two CPU cores.
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


def num_kept_tokens(share: float, length: int) -> int:
    """Number of encoder rows that the decoder receives: share · length, rounded, at least one."""
    return max(1, round(share * length))
