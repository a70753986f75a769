"""Figures of segmentation and depth, with bootstrap intervals over images. N images, C classes, H and W pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from aimv2_jax.eval.bootstrap import interval

_DELTA = 1.25
# Rows and columns that Eigen et al. (2014) evaluate in a NYUv2 image of 480 x 640 pixels: top, bottom, left, right.
_EIGEN, _EIGEN_SIZE = (45, 471, 41, 601), (480, 640)
DEPTH_METRICS = ("rmse", "abs_rel", "delta1")


def class_areas(
    truth: Integer[np.ndarray, "H W"], predicted: Integer[np.ndarray, "H W"], num_classes: int, ignore: int
) -> Integer[np.ndarray, "3 C"]:
    """Pixels of each class in both maps, in the prediction and in the truth; those of truth `ignore` do not count."""
    counted = truth != ignore
    truth, predicted = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
    areas = [truth[truth == predicted], predicted, truth]
    return np.stack([np.bincount(values, minlength=num_classes) for values in areas])


def iou(areas: Num[np.ndarray, "*N 3 C"]) -> Float[np.ndarray, "*N C"]:
    """Intersection over union of each class; NaN for a class that neither truth nor prediction has."""
    intersection, predicted, truth = np.moveaxis(np.asarray(areas, np.float64), -2, 0)
    union = predicted + truth - intersection
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def mean_iou(areas: Num[np.ndarray, "*N 3 C"]) -> Float[np.ndarray, "*N"]:
    """The mean of `iou` over the classes that have one."""
    values = iou(areas)
    present = np.isfinite(values)
    return np.asarray(np.where(present, values, 0).sum(-1) / np.maximum(present.sum(-1), 1))


def segmentation_metrics(areas: Integer[np.ndarray, "N 3 C"], names: list[str], seed: int = 0) -> dict[str, Any]:
    """`miou` of the summed areas (one confusion matrix of all images), its interval, `accuracy` and IoU by class.

    `accuracy` is the share of right pixels, `mean_accuracy` the mean share over the classes of the truth.
    """
    total = areas.sum(0)
    intersection, _, truth = total.astype(np.float64)
    of_class = iou(total)
    present = truth > 0
    return {
        "miou": float(mean_iou(total)),
        "miou_ci95": interval(areas, mean_iou, seed),
        "accuracy": float(intersection.sum() / max(truth.sum(), 1)),
        "mean_accuracy": float((intersection[present] / truth[present]).mean()) if present.any() else 0.0,
        "iou": {name: float(value) for name, value in zip(names, of_class) if np.isfinite(value)},
    }


def depth_errors(
    truth: Float[np.ndarray, "H W"], predicted: Float[np.ndarray, "H W"], counted: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, " 3"] | None:
    """RMSE in metres, mean of |error| / truth, and the share of pixels with max(t/p, p/t) < 1.25 (`DEPTH_METRICS`).

    Returns None if no pixel counts.
    """
    truth, predicted = truth[counted].astype(np.float64), predicted[counted].astype(np.float64)
    if not len(truth):
        return None
    error = predicted - truth
    delta1 = np.maximum(truth / predicted, predicted / truth) < _DELTA
    return np.array([np.sqrt(np.mean(error**2)), np.mean(np.abs(error) / truth), delta1.mean()])


def depth_metrics(errors: Float[np.ndarray, "N 3"], seed: int = 0) -> dict[str, Any]:
    """The mean over images of each of `DEPTH_METRICS`, as the field reports them, with its interval NAME_ci95."""
    means = errors.mean(0)
    metrics: dict[str, Any] = {name: float(value) for name, value in zip(DEPTH_METRICS, means)}
    for index, name in enumerate(DEPTH_METRICS):
        mean_of = lambda sums, index=index: sums[..., index] / len(errors)  # noqa: E731
        metrics[f"{name}_ci95"] = interval(errors, mean_of, seed)
    return metrics


def eigen_mask(height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """The pixels that Eigen et al. evaluate, scaled to an image of this size."""
    top, bottom = (int(row / _EIGEN_SIZE[0] * height) for row in _EIGEN[:2])
    left, right = (int(column / _EIGEN_SIZE[1] * width) for column in _EIGEN[2:])
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def counted_depths(
    truth: Float[np.ndarray, "H W"], limits: tuple[float, float], mask: str = "full"
) -> Bool[np.ndarray, "H W"]:
    """The pixels that count: depths strictly within `limits`, in the whole image or in `mask` "eigen"."""
    within = (truth > limits[0]) & (truth < limits[1])
    return within & eigen_mask(*truth.shape) if mask == "eigen" else within
