"""What a probe found: accuracies with their interval, and the confusion matrix. M test pictures, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from matplotlib import rc_context
from matplotlib.figure import Figure

from aimv2_jax.drawing import DARK, STYLE, draw_heading, drawable
from aimv2_jax.eval.probes.examples import Examples

_RESAMPLES = 10_000


def interval(right: Bool[np.ndarray, " M"], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `right`, over test pictures."""
    rng = np.random.default_rng(seed)
    # The number right in a resample of M pictures is binomial: nothing need be drawn picture by picture.
    means = rng.binomial(len(right), right.mean(), size=_RESAMPLES) / len(right)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def figures(test: Examples, predicted: Int[np.ndarray, " M"]) -> dict[str, Any]:
    """`top1, ci95, per_class`, and `by` where the examples have groups: {value: {top1, examples}}."""
    right = predicted == test.classes
    found: dict[str, Any] = {
        "top1": float(right.mean()),
        "ci95": interval(right),
        "per_class": {
            name: float(right[test.classes == number].mean())
            for number, name in enumerate(test.names)
            if (test.classes == number).any()
        },
    }
    groups = np.array(test.groups)
    if any(test.groups):
        found["by"] = {
            name: {"top1": float(right[groups == name].mean()), "examples": int((groups == name).sum())}
            for name in sorted(set(test.groups))
        }
    return found


def confusion_figure(test: Examples, predicted: Int[np.ndarray, " M"], heading: str, note: str) -> Figure:
    """A row a true class, a column a predicted one: shares of the row as shades, counts as numbers."""
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


def summary(found: dict[str, Any], names: Sequence[str]) -> str:
    """The figures for a person."""
    low, high = found["ci95"]
    lines = [
        f"{found['kind']} probe of {found['label']}: top-1 {found['top1']:.3f}, 95 % interval {low:.3f} to {high:.3f}, "
        f"{found['examples']['test']} test pictures, {len(names)} classes",
        f"chosen on {found['examples']['validation']} validation pictures: {found['best']}",
    ]
    if found["floor"] is not None:
        low, high = found["floor"]["ci95"]
        lines.append(f"floor, the nearest of 16 x 16 pixels: {found['floor']['top1']:.3f} ({low:.3f} to {high:.3f})")
    for title, part in (("by class", found["per_class"]), ("by group", found.get("by", {}))):
        if part:
            shown = {name: one["top1"] if isinstance(one, dict) else one for name, one in part.items()}
            lines.append(f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in shown.items()))
    return "\n".join(lines)
