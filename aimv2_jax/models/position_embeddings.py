"""Position embeddings of image patches. B batch, L patches, M patches of another grid, D width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sincos_positions(coords_BL2: Int[Array, "B L 2"], width: int) -> Float[Array, "B L {width}"]:
    """2-D sine-cosine embeddings of (row, column) patch positions, float32.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] with frequencies
    10000^(-k / (D/4)), k = 0 … D/4-1 (RECIPE.md §2).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    rows_BLQ, columns_BLQ = (coords_BL2[..., axis, None].astype(jnp.float32) * frequency for axis in (0, 1))
    parts = [wave(angle) for angle in (columns_BLQ, rows_BLQ) for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate(parts, axis=-1)


def resize_positions(
    table_LD: Float[Array, "L D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "M D"]:
    """Resizes a learned table to another grid of (rows, columns): bicubic, a = -0.5, half-pixel centres, float32.

    Antialiased along a side that shrinks. Equals Pillow's bicubic of a float image (RECIPE.md §8).
    """
    width = table_LD.shape[1]
    table = table_LD.astype(jnp.float32).reshape(*grid, width)
    return jax.image.resize(table, (*new_grid, width), "bicubic").reshape(-1, width)
