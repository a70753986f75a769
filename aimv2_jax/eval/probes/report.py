"""Accuracy of a classifier with its confidence interval, and the confusion matrix. M test images, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure

from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.plotting import DARK, STYLE, draw_heading, drawable

_RESAMPLES = 10_000


def interval(correct: Bool[np.ndarray, " M"], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `correct`, over test images."""
    rng = np.random.default_rng(seed)
    # The number of correct images in a resample is binomial, so no image is resampled by itself.
    means = rng.binomial(len(correct), correct.mean(), size=_RESAMPLES) / len(correct)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def classification_metrics(test: LabelledDataset, predicted: Int[np.ndarray, " M"]) -> dict[str, Any]:
    """`top1`, `ci95` and `per_class`; for a dataset with groups also `by`: {value: {top1, examples}}."""
    correct = predicted == test.classes
    metrics: dict[str, Any] = {
        "top1": float(correct.mean()),
        "ci95": interval(correct),
        "per_class": {
            name: float(correct[test.classes == class_id].mean())
            for class_id, name in enumerate(test.names)
            if (test.classes == class_id).any()
        },
    }
    groups = np.array(test.groups)
    if any(test.groups):
        metrics["by"] = {
            name: {"top1": float(correct[groups == name].mean()), "examples": int((groups == name).sum())}
            for name in sorted(set(test.groups))
        }
    return metrics


def score_metrics(test: LabelledDataset, scores: Float[np.ndarray, "M C"]) -> dict[str, Any]:
    """`classification_metrics` of the best classes, and `top5` with its interval `top5_ci95`."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]  # As argmax, the first of equal scores.
    found = (best == test.classes[:, None]).any(axis=1)
    return classification_metrics(test, best[:, 0]) | {"top5": float(found.mean()), "top5_ci95": interval(found)}


def confusion_figure(test: LabelledDataset, predicted: Int[np.ndarray, " M"], heading: str, note: str) -> Figure:
    """The confusion matrix: rows are true classes, columns predicted ones; shade is the share of the row."""
    size = len(test.names)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (test.classes, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    cell, left, top = max(0.16, min(0.42, 24 / size)), 1.35, 1.75
    width, height = max(left + size * cell + 0.3, 6.5), top + size * cell + 0.3
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        axes = figure.add_axes((left / width, 0.3 / height, size * cell / width, size * cell / height))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        names = [drawable(name) for name in test.names]
        points = 8 if cell > 0.25 else 4
        axes.set_xticks(range(size), names, rotation=90, size=points)
        axes.set_yticks(range(size), names, size=points)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_ylabel("true", size=points)
        axes.grid(False)
        if cell > 0.25:
            for row, column in zip(*np.nonzero(counts)):
                color = "white" if shares[row, column] > 0.5 else DARK
                axes.text(column, row, counts[row, column], ha="center", va="center", size=7, color=color)
    return figure


def summary(result: dict[str, Any], names: Sequence[str]) -> str:
    """The metrics as lines of text."""
    low, high = result["ci95"]
    lines = [
        f"{result['kind']} probe of {result['label']}: top-1 {result['top1']:.3f}, "
        f"95 % interval {low:.3f} to {high:.3f}, "
        f"{result['examples']['test']} test images, {len(names)} classes",
        _chosen(result),
    ]
    if result["floor"] is not None:
        low, high = result["floor"]["ci95"]
        lines.append(f"floor (nearest 16 x 16 pixels): {result['floor']['top1']:.3f} ({low:.3f} to {high:.3f})")
    for title, part in (("by class", result["per_class"]), ("by group", result.get("by", {}))):
        if part:
            top1 = {name: value["top1"] if isinstance(value, dict) else value for name, value in part.items()}
            lines.append(f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in top1.items()))
    return "\n".join(lines)


def _chosen(result: dict[str, Any]) -> str:
    if result["examples"]["validation"]:
        return f"chosen on {result['examples']['validation']} validation images: {result['best']}"
    return f"the best of {len(result['grid'])} grid points on the test images, as in the paper: {result['best']}"
