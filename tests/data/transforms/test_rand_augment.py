"""RandAugment and colour jitter: each operation against numpy, timm's file where it is installed, and the draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from aimv2_jax.data.transforms.color_jitter import ColorJitter
from aimv2_jax.data.transforms.rand_augment import OPERATIONS, RandAugment, Step
from tests.interop.compare_rand_augment import load_timm, operation_differences, policy_differences

FILL = (124, 116, 104)
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
GRADIENT = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)


def changed(operation: str, magnitude: float, direction: int, pixels: np.ndarray = IMAGE) -> np.ndarray:
    step = Step(operation, magnitude, direction)
    return np.asarray(step(Image.fromarray(pixels), FILL)).astype(int)


def test_color_operations_equal_numpy():
    """Operations on single colors have the values of their formulas."""
    pixels = IMAGE.astype(int)
    np.testing.assert_array_equal(changed("invert", 3, 1), 255 - pixels)
    np.testing.assert_array_equal(changed("posterize", 9, 1), pixels & 0b10000000)  # 1 of 8 bits is left.
    np.testing.assert_array_equal(changed("posterize", 5, 1), pixels & 0b11000000)
    np.testing.assert_array_equal(changed("solarize", 9, 1), np.where(pixels < 26, pixels, 255 - pixels))
    np.testing.assert_array_equal(
        changed("solarize_add", 9, 1), np.where(pixels < 128, np.minimum(pixels + 99, 255), pixels)
    )
    factor = {direction: 1 + direction * 0.81 for direction in (1, -1)}
    for direction, expected in factor.items():
        bright = (pixels * expected).clip(0, 255)
        assert np.abs(changed("brightness", 9, direction) - bright).max() <= 1
        grey = np.asarray(Image.fromarray(IMAGE).convert("L")).astype(int)
        contrast = grey.mean().round() * (1 - expected) + pixels * expected
        assert np.abs(changed("contrast", 9, direction) - contrast.clip(0, 255)).max() <= 1
        color = grey[..., None] * (1 - expected) + pixels * expected
        assert np.abs(changed("color", 9, direction) - color.clip(0, 255)).max() <= 1
    stretched = changed("auto_contrast", 9, 1, GRADIENT // 2 + 40)
    assert stretched.min() == 0 and stretched.max() == 255
    equalised = changed("equalize", 9, 1, (GRADIENT // 4).astype(np.uint8))
    assert abs(np.median(equalised) - 127) < 12 and np.ptp(equalised) > 250  # 64 levels of 4 are left.
    flat = np.full((20, 20, 3), 90, np.uint8)
    np.testing.assert_array_equal(changed("sharpness", 9, 1, flat), 90)
    assert changed("sharpness", 9, 1, GRADIENT).std() >= changed("sharpness", 9, -1, GRADIENT).std()


def test_geometric_operations_move_pixels():
    """Translations, shears and rotations move a point where their matrices say, and fill with the mean colour."""
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[20, 20] = 255

    def point(operation: str, magnitude: float, direction: int) -> tuple[float, float]:
        found = changed(operation, magnitude, direction, pixels)
        bright = np.abs(found - FILL).sum(-1) > 0
        weights = found.sum(-1) * (found.sum(-1) < 766) * bright
        inside = (found[..., 0] == found[..., 1]) & (found[..., 1] == found[..., 2])  # The fill is not grey.
        rows, columns = np.indices(weights.shape)
        weights = weights * inside
        return (rows * weights).sum() / weights.sum(), (columns * weights).sum() / weights.sum()

    shift = 0.45 * 41
    np.testing.assert_allclose(point("translate_x", 10, 1), (20, 20 - shift), atol=0.6)
    np.testing.assert_allclose(point("translate_y", 10, -1), (20 + shift, 20), atol=0.6)
    assert changed("translate_x", 10, 1)[0, -1].tolist() == list(FILL)
    pixels[20, 20], pixels[8, 20] = 0, 255
    np.testing.assert_allclose(point("shear_x", 10, 1), (8, 20 - 0.3 * 8), atol=0.6)
    angle = np.deg2rad(30)  # Counter-clockwise about the centre.
    np.testing.assert_allclose(point("rotate", 10, 1), (20 - 12 * np.cos(angle), 20 - 12 * np.sin(angle)), atol=0.6)
    np.testing.assert_allclose(point("rotate", 10, -1), (20 - 12 * np.cos(angle), 20 + 12 * np.sin(angle)), atol=0.6)
    pixels[8, 20], pixels[20, 8] = 0, 255
    np.testing.assert_allclose(point("shear_y", 10, -1), (20 + 0.3 * 8, 8), atol=0.6)


def test_randaugment_draws_by_their_distribution():
    """Half of the two operations of an image are applied, all equally often, at magnitude 9 with deviation 0.5."""
    policy = RandAugment(5, FILL)
    drawn = [policy.steps(example) for example in range(4000)]
    counts = np.bincount([len(steps) for steps in drawn], minlength=3) / len(drawn)
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.03)
    steps = [step for one in drawn for step in one]
    names, numbers = np.unique([step.operation for step in steps], return_counts=True)
    assert set(names) == set(OPERATIONS) and len(names) == 15
    np.testing.assert_allclose(numbers / len(steps), 1 / 15, atol=0.02)
    magnitudes = np.array([step.magnitude for step in steps])
    assert magnitudes.max() == 10 and abs(np.median(magnitudes) - 9) < 0.04
    below = magnitudes[magnitudes < 9]
    assert abs(np.sqrt(np.mean((below - 9) ** 2)) - 0.5) < 0.03  # The half that is not clipped.
    assert abs(np.mean([step.direction for step in steps])) < 0.05
    assert drawn[:50] == [policy.steps(example) for example in range(50)]
    assert drawn[:50] != [RandAugment(6, FILL).steps(example) for example in range(50)]


def test_color_jitter_factors_and_orders():
    """Brightness, contrast and saturation change by at most 0.3, in each of their orders."""
    image, enhancers = Image.fromarray(IMAGE), (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    jitter = ColorJitter(1, 0.3)
    first = np.asarray(jitter(image, 0))
    np.testing.assert_array_equal(first, np.asarray(jitter(image, 0)))
    assert not np.array_equal(first, np.asarray(jitter(image, 1)))
    np.testing.assert_array_equal(np.asarray(ColorJitter(1, 0.0)(image, 0)), IMAGE)
    called = []

    class Enhancer:
        def __init__(self, index, image):
            self.index, self.image = index, image

        def enhance(self, factor):
            called.append((self.index, factor))
            return self.image

    with pytest.MonkeyPatch.context() as patched:
        own = tuple(lambda image, index=index: Enhancer(index, image) for index in range(len(enhancers)))
        patched.setattr("aimv2_jax.data.transforms.color_jitter._ENHANCERS", own)
        for example in range(300):
            jitter(image, example)
    orders = {tuple(index for index, _ in called[start : start + 3]) for start in range(0, len(called), 3)}
    factors = np.array([factor for _, factor in called])
    assert len(orders) == 6 and factors.min() >= 0.7 and factors.max() <= 1.3 and np.ptp(factors) > 0.55


def test_randaugment_equals_timm():
    """Each operation, and the whole policy with our draws, gives timm's pixels."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed; tests/interop/compare_rand_augment.py compares with its wheel")
    timm = load_timm(Path(spec.submodule_search_locations[0]) / "data/auto_augment.py")
    images = [Image.fromarray(IMAGE), Image.fromarray(GRADIENT)]
    assert operation_differences(timm, images) == []
    assert policy_differences(timm, images, examples=200) == []
