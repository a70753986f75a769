"""Position embeddings of image patches. B batch, L patches, D width."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sincos_positions(coords_BL2: Int[Array, "B L 2"], width: int) -> Float[Array, "B L {width}"]:
    """2-D sine-cosine table rows of the given (row, column) patch positions, float32.

    The first half of the channels codes the column, the second half the row; each half is [sin | cos] with frequencies
    10000^(-k / (D/4)), k = 0 … D/4-1 (RECIPE.md §2).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    rows_BLQ, columns_BLQ = (coords_BL2[..., axis, None].astype(jnp.float32) * frequency for axis in (0, 1))
    parts = [wave(angle) for angle in (columns_BLQ, rows_BLQ) for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate(parts, axis=-1)
