"""Windows cover an image, and pixels get the interpolated outputs of the windows that cover them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.eval.dense.heads import merged, upsampling
from aimv2_jax.eval.dense.windows import (
    Window,
    interpolation,
    scaled_size,
    side_at,
    sliding_sides,
    sliding_windows,
    window_weights,
)


@pytest.mark.parametrize(("length", "starts"), [(64, [0]), (65, [0]), (100, [0, 36]), (112, [0, 43, 48]), (62, [0])])
def test_sliding_sides_start_as_published(length, starts):
    """Windows of 64 pixels start every 43; the last one ends where the side does; a spare half patch is squeezed."""
    sides = sliding_sides(length, 8, 8, 43 / 64)
    assert [round(side.start * length, 6) for side in sides] == starts
    assert sides[-1].end == 1 and all(side.patches == 8 for side in sides)
    if len(starts) > 1:
        assert all((side.end - side.start) * length == pytest.approx(64) for side in sides)


def test_short_side_is_taken_as_a_whole():
    """A side with fewer pixels than the window gets as many patches as fit it, one at least."""
    assert [side_at(length, 8, 8, 0.7).patches for length in (3, 27, 33, 61)] == [1, 3, 4, 8]
    assert {(side.start, side.end) for side in (side_at(27, 8, 8, 0.7), side_at(67, 8, 8, 0.7))} == {(0, 1)}


def test_scaled_image_covers_the_window():
    """At scale 1 an image is as small as it can be to cover the window, or has its own size if that covers it."""
    assert scaled_size((480, 640), (518, 518), 1.0) == pytest.approx((518, 690.667), abs=1e-3)
    assert scaled_size((480, 640), (518, 518), 0.5) == pytest.approx((259, 345.333), abs=1e-3)
    assert scaled_size((480, 640), (420, 546), 1.0, own_size=True) == (480, 640)
    assert scaled_size((240, 320), (420, 546), 1.0, own_size=True) == pytest.approx((420, 560))


def test_interpolation_equals_that_of_jax():
    """Weights on the host and on the devices are those of a bilinear resize with half-pixel centres."""
    values = np.random.default_rng(0).normal(size=5).astype(np.float32)
    expected = jax.image.resize(jnp.asarray(values), (35,), "linear")
    padded = np.concatenate([values, [1e6, 1e6]]).astype(np.float32)
    host = interpolation((np.arange(35) + 0.5) / 7, 5, 7)
    devices = np.asarray(upsampling(jnp.array([5]), 7, 7))[0, :35]
    np.testing.assert_allclose(host @ padded, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(devices @ padded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_merged_windows_give_back_a_plane(mirrored):
    """Where each patch has its own place as output, each pixel gets its place, from windows at any scale."""
    size, side = (90, 124), 8
    for scale in (1.0, 1.3):
        windows = sliding_windows(size, (8, 8), side, 0.6, scale, mirrored=mirrored)
        assert len(windows) >= 2
        outputs = np.zeros((len(windows), 8, 8, 2), np.float32)
        for index, window in enumerate(windows):
            left, top, right, bottom = window.box
            down, across = (bottom - top) / 8, (right - left) / 8
            outputs[index, ..., 0] = (top + (np.arange(8) + 0.5) * down)[:, None]
            places = left + (np.arange(8) + 0.5) * across
            outputs[index, ..., 1] = places[::-1] if mirrored else places
        rows, columns = window_weights(windows, size, (8, 8))
        assert (rows.sum(-1).max(0) > 0).all() and (columns.sum(-1).max(0) > 0).all()
        found = np.asarray(merged(outputs, rows, columns, False))
        y, x = np.mgrid[: size[0], : size[1]] + 0.5
        # Half a patch at the edge of a window has the place of the nearest centre.
        inner = (slice(6, -6), slice(6, -6))
        assert np.abs(found[..., 0] - y)[inner].max() < 4 and np.abs(found[..., 1] - x)[inner].max() < 4
        assert np.abs(found[..., 0] - y)[inner].mean() < 0.8


def test_merged_mean_ignores_other_windows():
    """A pixel has the mean of the windows that cover it, and padding windows count for nothing."""
    windows = [Window((0, 0, 6, 4), (2, 3)), Window((4, 0, 10, 4), (2, 3))]
    rows, columns = window_weights(windows, (4, 10), (2, 3))
    outputs = np.stack([np.full((2, 3, 1), 1.0), np.full((2, 3, 1), 3.0), np.full((2, 3, 1), 99.0)]).astype(np.float32)
    rows, columns = (np.pad(weights, ((0, 1), (0, 0), (0, 0))) for weights in (rows, columns))
    found = np.asarray(merged(outputs, rows, columns, False))[..., 0]
    np.testing.assert_allclose(found, [[1, 1, 1, 1, 2, 2, 3, 3, 3, 3]] * 4, rtol=1e-6)
