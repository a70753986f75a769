"""The resize on the devices, compared with Pillow's."""

import jax
import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.resampling import Canvas, Unresized, bicubic_taps, unresized
from aimv2_jax.pretrained import device_resize

CANVAS, SIZE, COUNT = Canvas(72, 80, 13), (48, 64), 24
resized = jax.jit(device_resize.resized)


def noise(rng, width, height):
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


def random_boxes():
    """(image, box, size, mirrored): enlarged and reduced by up to five, at whole and at broken pixels."""
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        width, height = rng.integers(20, 110, 2).tolist()
        left, top = rng.uniform(0, width - 10), rng.uniform(0, height - 10)
        box = left, top, rng.uniform(left + 8, width), rng.uniform(top + 8, height)
        if number % 3 == 0:
            box = tuple(float(round(side)) for side in box)
        size = int(rng.integers(8, SIZE[1] + 1)), int(rng.integers(8, SIZE[0] + 1))
        yield noise(rng, width, height), box, size, bool(number % 2)


def test_boxes_have_pillows_pixels():
    """Bitwise, within the canvas and beyond it; the rest of a result's array is zero."""
    cases = list(random_boxes())
    images = [unresized(*case, CANVAS) for case in cases]
    on_host = [image.rows.weights.shape[1] == 1 for image in images]
    assert 0 < sum(on_host) < COUNT / 2
    found = np.asarray(resized(device_resize.pack(images, CANVAS, SIZE, COUNT + 2)))
    assert found.shape == (COUNT + 2, *SIZE, 3) and found.dtype == np.uint8 and not found[COUNT:].any()
    for row, (image, box, (width, height), mirrored) in zip(found, cases):
        np.testing.assert_array_equal(row[:height, :width], geometry.resize(image, box, (width, height), mirrored))
        assert not row[height:].any() and not row[:, width:].any()


@pytest.mark.parametrize("limit", [None, 0])
def test_centre_squares_have_pillows_pixels(limit, monkeypatch):
    """Bitwise, upright and across, also where an image is too long to be resized as a whole."""
    if limit is not None:
        monkeypatch.setattr(geometry, "MAX_RESIZED_PIXELS", limit)
    sizes = [(40, 100), (101, 37), (60, 60), (48, 48), (130, 170), (64, 49)]
    photos = [noise(np.random.default_rng(number), *size) for number, size in enumerate(sizes)]
    images = [unresized(photo, None, 48, bool(number % 2), CANVAS) for number, photo in enumerate(photos)]
    found = np.asarray(resized(device_resize.pack(images, CANVAS, SIZE, COUNT + 2)))
    for number, photo in enumerate(photos):
        expected = geometry.center_view(photo, 48)
        np.testing.assert_array_equal(found[number, :, :48], expected[:, ::-1] if number % 2 else expected)


def test_brightest_edges_stay_within_eight_bits():
    """Overshoots of the cubic kernel are cut at 0 and 255 after each of the two sums, as Pillow does."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::3], stripes[:, ::4] = 255, 255
    image = Image.fromarray(stripes)
    packed = device_resize.pack([unresized(image, (0, 0, 30, 30), (64, 48), False, CANVAS)], CANVAS, SIZE, COUNT + 2)
    expected = geometry.resize(image, (0, 0, 30, 30), (64, 48))
    assert expected.min() == 0 and expected.max() == 255
    np.testing.assert_array_equal(np.asarray(resized(packed))[0], expected)


def test_patches_are_those_of_patchify():
    pixels = np.asarray(noise(np.random.default_rng(0), 64, 48))
    image = Unresized(pixels, bicubic_taps(48, 0, 48, 48), bicubic_taps(64, 0, 64, 64))
    arrays = device_resize.pack([image], CANVAS, SIZE, 1)
    found = jax.jit(device_resize.resized_patches, static_argnums=1)(arrays, 16)
    np.testing.assert_array_equal(found[0], geometry.patchify(pixels, 16))
