"""Figures of segmentation and depth against loops over pixels."""

import math

import numpy as np
import pytest

from aimv2_jax.eval.bootstrap import interval
from aimv2_jax.eval.dense import metrics

IGNORE = 255


def maps(seed, classes=6, size=(23, 31)):
    """Random maps of truth, with pixels that do not count, and of predictions that are often right."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=size)
    predicted = np.where(rng.random(size) < 0.6, truth, rng.integers(classes, size=size))
    truth[rng.random(size) < 0.1] = IGNORE
    return truth.astype(np.uint8), predicted.astype(np.uint8)


def looped_iou(pairs, classes):
    """IoU by class over all maps, by sets of pixels."""
    found = []
    for label in range(classes):
        both = either = 0
        for truth, predicted in pairs:
            for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist()):
                if t != IGNORE:
                    both += t == label and p == label
                    either += t == label or p == label
        found.append(both / either if either else math.nan)
    return found


def test_miou_equals_a_loop_over_pixels():
    """IoU by class, their mean and the accuracies are those of one confusion matrix over all images."""
    pairs = [maps(seed) for seed in range(4)]
    pairs[0][1][:5] = 6  # A class that is predicted, but not in the truth: its IoU is 0.
    areas = np.stack([metrics.class_areas(*pair, 8, IGNORE) for pair in pairs])
    expected = looped_iou(pairs, 8)
    result = metrics.segmentation_metrics(areas, [f"c{index}" for index in range(8)])
    assert list(result["iou"]) == [f"c{index}" for index in range(7)]  # Class 7 is in neither.
    np.testing.assert_allclose(list(result["iou"].values()), expected[:7], rtol=0, atol=1e-6)
    assert result["miou"] == pytest.approx(np.nanmean(expected), abs=1e-6) and expected[6] == 0
    truth, predicted = (np.concatenate([pair[index].ravel() for pair in pairs]) for index in (0, 1))
    right, counted = (truth == predicted)[truth != IGNORE], truth[truth != IGNORE]
    assert result["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    by_class = [right[counted == label].mean() for label in range(6)]
    assert result["mean_accuracy"] == pytest.approx(np.mean(by_class), abs=1e-6)


def test_miou_interval_resamples_images():
    """The interval is that of the figure over resampled images; of equal images it is a point."""
    areas = np.stack([metrics.class_areas(*maps(seed), 6, IGNORE) for seed in range(30)])
    low, high = interval(areas, metrics.mean_iou)
    value = float(metrics.mean_iou(areas.sum(0)))
    assert low < value < high and high - low < 0.1
    rng, resampled = np.random.default_rng(1), []
    for _ in range(400):
        resampled.append(metrics.mean_iou(areas[rng.integers(30, size=30)].sum(0)))
    assert (low, high) == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.006)  # There are 400 resamples.
    same = np.repeat(areas[:1], 5, axis=0)
    assert interval(same, metrics.mean_iou) == pytest.approx([metrics.mean_iou(areas[0])] * 2)


def test_depth_errors_equal_a_loop_over_pixels():
    """RMSE, abs-rel and δ1 are those of the pixels within the limits; an image without any is left out."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 12, (17, 29)).astype(np.float32)
    predicted = (truth * rng.uniform(0.7, 1.5, truth.shape) + 0.01).astype(np.float32)
    truth[0] = 0  # Not measured.
    squares, relative, close = [], [], []
    for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist()):
        if 0.001 < t < 10:
            squares.append((p - t) ** 2)
            relative.append(abs(p - t) / t)
            close.append(max(t / p, p / t) < 1.25)
    expected = [math.sqrt(np.mean(squares)), np.mean(relative), np.mean(close)]
    errors = metrics.depth_errors(truth, predicted, metrics.counted_depths(truth, (0.001, 10.0)))
    np.testing.assert_allclose(errors, expected, rtol=0, atol=1e-6)
    assert metrics.depth_errors(truth, predicted, np.zeros(truth.shape, bool)) is None
    result = metrics.depth_metrics(np.stack([errors, 2 * errors]))
    assert result["rmse"] == pytest.approx(1.5 * expected[0], abs=1e-6)
    low, high = result["abs_rel_ci95"]
    assert low == pytest.approx(expected[1]) and high == pytest.approx(2 * expected[1])


def test_eigen_mask_is_scaled_to_the_image():
    """At NYUv2's size the mask has rows 45 to 471 and columns 41 to 601; at half of it, half of these."""
    for scale in (1, 2):
        rows, columns = np.nonzero(metrics.eigen_mask(480 // scale, 640 // scale))
        assert (rows.min(), rows.max() + 1) == (45 // scale, 471 // scale)
        assert (columns.min(), columns.max() + 1) == (41 // scale, 601 // scale)
    truth = np.full((480, 640), 2.0)
    assert metrics.counted_depths(truth, (0.001, 10.0), "eigen").sum() == 426 * 560
