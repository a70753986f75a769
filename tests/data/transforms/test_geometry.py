"""Crops, resize and patches against independent computations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2_jax.data.transforms import geometry


def crops(width, height, count, area=(0.4, 1.0), ratio=(3 / 4, 4 / 3)):
    rng = np.random.default_rng(1)
    return np.array([geometry.crop_box(rng, width, height, area, ratio) for _ in range(count)]).T


def ks_distance(first, second):
    """Kolmogorov-Smirnov distance of two samples."""
    first, second = np.sort(first), np.sort(second)
    points = np.concatenate([first, second])
    cdfs = [np.searchsorted(sample, points, side="right") / len(sample) for sample in (first, second)]
    return np.abs(cdfs[0] - cdfs[1]).max()


def grid_by_the_rule(width, height, area):
    """`fit_grid` by RECIPE.md §9, by enumerating all grids."""

    def error(grid):
        quotient = (grid[1] / grid[0]) / (width / height)
        return max(quotient, 1 / quotient) - 1

    grids = [(rows, columns) for rows in range(1, area + 1) for columns in range(1, area // rows + 1)]
    close = [grid for grid in grids if error(grid) <= 0.05]
    best = max(close, key=lambda grid: grid[0] * grid[1], default=None)
    if best is None or best[0] * best[1] < 0.8 * area:
        full = [grid for grid in grids if grid[0] * grid[1] >= 0.8 * area]
        least = min(map(error, full))
        return {grid for grid in full if error(grid) <= least + 1e-12}
    return {grid for grid in close if grid[0] * grid[1] == best[0] * best[1]}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([2, 7, 16, 128, 200]))
def test_grid_when_fitted_then_what_the_rule_says(width, height, area):
    assert geometry.fit_grid(width, height, area) in grid_by_the_rule(width, height, area)


def test_fit_grid_transposed_or_square_image():
    """The grid of an image turned by 90 degrees is turned too, and a square image has a square grid."""
    assert geometry.fit_grid(640, 480, 256) == geometry.fit_grid(480, 640, 256)[::-1] == (14, 18)
    assert geometry.fit_grid(500, 500, 256) == (16, 16) and geometry.fit_grid(20_000, 1, 128) == (1, 128)


@pytest.mark.parametrize(("width", "height"), [(1000, 1000), (1600, 900), (700, 1400)])
def test_crop_when_drawn_often_then_distributed_as_torchvision_says(width, height):
    count = 4000
    boxes = crops(width, height, count)
    left, top, right, bottom = boxes
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    # Independent computation: ten tries per image at once, of which the first that fits is used.
    rng = np.random.default_rng(2)
    share, aspect = rng.uniform(0.4, 1.0, (count, 10)), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    w, h = np.sqrt(share * width * height * aspect), np.sqrt(share * width * height / aspect)
    fits = (w <= width) & (h <= height)
    found = fits.any(1)
    first = np.flatnonzero(found), fits.argmax(1)[found]
    fallback = geometry.crop_box(np.random.default_rng(0), width, height, (2.0, 2.0), (3 / 4, 4 / 3))
    ours = np.array([tuple(box) != fallback for box in boxes.T])
    # The tolerance is four standard deviations of the difference of two proportions.
    assert abs(ours.mean() - found.mean()) <= 4 * np.sqrt(2 * found.mean() * (1 - found.mean()) / count)
    our_w, our_h = (right - left)[ours], (bottom - top)[ours]
    critical = 1.95 * np.sqrt(2 / ours.sum())  # Equal distributions exceed this for one seed in a thousand.
    assert (our_w * our_h).min() / (width * height) > 0.399 and (our_w * our_h).max() <= width * height
    assert (our_w / our_h).min() > 0.749 and (our_w / our_h).max() < 1.335
    assert ks_distance(our_w * our_h / (width * height), share[first]) < critical
    assert ks_distance(np.log(our_w / our_h), np.log(aspect[first])) < critical
    for offset, room in ((left[ours], width - our_w), (top[ours], height - our_h)):
        wide = room > 20
        assert ks_distance((offset[wide] + 0.5) / (room[wide] + 1), rng.uniform(size=wide.sum())) < 1.95 * np.sqrt(
            2 / wide.sum()
        )


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (1000, 10, (493, 0, 506, 10)),
        (10, 1000, (0, 493, 10, 506)),
        (20_000, 1, (9999, 0, 10_000, 1)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_crop_when_ten_tries_do_not_fit_then_the_centre(width, height, box):
    for left, top, right, bottom in crops(width, height, 20).T:
        assert (left, top, right, bottom) == box


def cubic_weights(start, stop, size_in, size_out):
    """Matrix of an antialiased bicubic resize (a = -0.5) from [start, stop) of `size_in` pixels to `size_out`."""
    scale = (stop - start) / size_out
    centres = start + (np.arange(size_out)[:, None] + 0.5) * scale
    x = np.abs((np.arange(size_in) + 0.5 - centres) / max(scale, 1))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("box", [(0, 0, 61, 47), (5, 3, 50, 44), (10, 10, 20, 18)])
def test_resize_when_compared_with_the_formula_then_within_a_rounding(box):
    pixels = np.random.default_rng(0).integers(0, 256, (47, 61, 3), np.uint8)
    got = geometry.resize(Image.fromarray(pixels), box, 14)
    inside = pixels[box[1] : box[3], box[0] : box[2]]  # Pixels outside do not contribute.
    down, across = (cubic_weights(0, side, side, 14) for side in inside.shape[:2])
    # Pillow resizes the width first and rounds to 8 bits in between.
    between = np.clip(np.round(np.einsum("xw,hwc->hxc", across, inside)), 0, 255)
    wanted = np.clip(np.einsum("yh,hxc->yxc", down, between), 0, 255)
    assert np.abs(got - wanted).max() <= 1


def test_resize_of_a_box_sees_no_pixel_outside():
    """Like torchvision's `resized_crop`: pixels beside the crop have no influence."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    box = (7, 5, 33, 38)
    crop = Image.fromarray(pixels).crop(box).resize((14, 14), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(geometry.resize(Image.fromarray(pixels), box, 14), crop)
    other = 255 - pixels
    other[5:38, 7:33] = pixels[5:38, 7:33]
    np.testing.assert_array_equal(geometry.resize(Image.fromarray(other), box, 14), crop)


def test_center_view_when_wide_then_the_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    np.testing.assert_array_equal(geometry.center_view(Image.fromarray(pixels), 20), np.full((20, 20, 3), 200))


@pytest.mark.parametrize("size", [(900, 3), (3, 900), (901, 7), (450, 30), (2, 601)])
def test_center_view_when_very_long_then_the_same(monkeypatch, size):
    """Beyond a size limit only the middle is resized, which differs by rounding only."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    whole = geometry.center_view(image, 28)
    monkeypatch.setattr(geometry, "MAX_RESIZED_PIXELS", 0)
    assert np.abs(geometry.center_view(image, 28).astype(int) - whole).max() <= 1


@pytest.mark.parametrize("size", [(5_000_000, 1), (1, 5_000_000)])
def test_center_view_when_extremely_long_then_cheap(size):
    assert (geometry.center_view(Image.new("RGB", size, (255, 0, 0)), 224) == (255, 0, 0)).all()


def test_resize_when_mirrored_then_left_is_right():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    plain, mirrored = (geometry.resize(image, (3, 2, 33, 28), 14, mirrored) for mirrored in (False, True))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_patchify_when_compared_with_slices_then_row_major_row_column_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    patches, coords = geometry.patchify(pixels, 3), geometry.patch_coords((2, 3))
    assert patches.shape == (6, 27)
    assert coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for patch, (row, column) in zip(patches, coords):
        square = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert patch.tolist() == [int(square[y, x, c]) for y in range(3) for x in range(3) for c in range(3)]
    np.testing.assert_array_equal(geometry.unpatchify(patches, (2, 3), 3), pixels)
    batch = np.zeros((2, 6, 27), np.uint8)
    geometry.patchify(pixels, 3, out=batch[1])
    assert not batch[0].any()
    np.testing.assert_array_equal(batch[1], patches)
