"""Resized learned positions against Pillow and a closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aimv2_jax.models.position_embeddings import resize_positions


@pytest.mark.parametrize("grids", [((4, 4), (6, 6)), ((16, 16), (24, 24)), ((6, 5), (4, 9)), ((24, 24), (16, 16))])
def test_resize_positions_equals_pillow(grids):
    """Resized positions are equal to Pillow's bicubic resize of a float image."""
    (rows, columns), (new_rows, new_columns) = grids
    table = np.random.default_rng(0).normal(size=(rows, columns, 3)).astype(np.float32)
    ours = resize_positions(jnp.asarray(table.reshape(-1, 3)), (rows, columns), (new_rows, new_columns))
    for channel in range(3):
        image = Image.fromarray(table[..., channel])  # Mode F.
        expected = np.asarray(image.resize((new_columns, new_rows), Image.Resampling.BICUBIC)).ravel()
        np.testing.assert_allclose(ours[:, channel], expected, rtol=0, atol=1e-5)  # Sums of 16 products in float32.


def test_resize_positions_of_ramp():
    """An enlarged ramp is still a ramp from three cells inside the border."""
    row, column = np.mgrid[:16, :16].astype(np.float32)
    table = np.stack([row, column, 2 * row - 3 * column], axis=-1).reshape(-1, 3)
    ours = np.asarray(resize_positions(jnp.asarray(table), (16, 16), (24, 24))).reshape(24, 24, 3)
    row, column = (np.mgrid[:24, :24] + 0.5) * 16 / 24 - 0.5  # Centres of the new cells among the old ones.
    expected = np.stack([row, column, 2 * row - 3 * column], axis=-1)
    # Sixteen products and their sums are rounded by half a unit in the last place of entries of up to 45.
    atol = 16 * 45 * 2.0**-24
    np.testing.assert_allclose(ours[3:-3, 3:-3], expected[3:-3, 3:-3], rtol=0, atol=atol)
    assert np.abs(ours - expected).max() > 0.01  # The border does differ, so the test is sensitive.
