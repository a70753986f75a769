"""Figures of a dense probe: predictions beside the truth, and bars of the classes. H and W pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from aimv2_jax.eval.dense.dataset import IGNORED
from aimv2_jax.eval.dense.predict import Prediction
from aimv2_jax.eval.dense.settings import DEPTH, DenseConfig
from aimv2_jax.eval.plots import image_grid
from aimv2_jax.plotting import MARGIN, STYLE, class_colours, depth_colours, draw_heading, drawable

_SIDE = 256  # Pixels of the longer side of a drawn image.
_BAR_HEIGHT = 0.19  # Inches.


def map_colours(values: np.ndarray, config: DenseConfig) -> UInt8[np.ndarray, "H W 3"]:
    """A map as colours: those of its classes, or depths, bright where near; grey does not count."""
    if config.task != DEPTH:
        return class_colours()[values]
    low, high = config.depths
    return depth_colours((values - low) / (high - low), (values > low) & (values < high))


def predictions_figure(predictions: Sequence[Prediction], config: DenseConfig, heading: str) -> Figure:
    """Images with their true and predicted maps; pixels that do not count are grey in both."""
    columns: dict[str, list[np.ndarray]] = {"image": [], "truth": [], "predicted": []}
    for prediction in predictions:
        truth, predicted = prediction.sample.map, prediction.predicted.copy()
        if config.task == DEPTH:
            predicted[(truth <= config.depths[0]) | (truth >= config.depths[1])] = 0
        else:
            predicted[truth == IGNORED] = IGNORED
        image = prediction.sample.image.decode_full()
        size = _drawn_size(image.size)
        columns["image"].append(np.asarray(image.resize(size)))
        for name, values in (("truth", truth), ("predicted", predicted)):
            drawn = Image.fromarray(map_colours(values, config)).resize(size, Image.Resampling.NEAREST)
            columns[name].append(np.asarray(drawn))
    half = -(-len(predictions) // 2)
    parts = [slice(0, half), slice(half, None)] if len(predictions) > 1 else [slice(0, 1)]
    groups = [("", {name: images[part] for name, images in columns.items()}) for part in parts]
    colours = "Bright is near" if config.task == DEPTH else "Colours as in the bars of the classes"
    note = f"Images of the test set, spread over it. {colours}; grey pixels do not count."
    return image_grid(groups, heading, note)


def bars_figure(values: Mapping[str, float], names: Sequence[str], heading: str, note: str) -> Figure:
    """The IoU of each class, the best first, in the colours of `predictions_figure`; `names` has all classes."""
    colours = class_colours() / 255
    ordered = sorted(values.items(), key=lambda item: -item[1])
    width, left, top, bottom = 7.0, 1.9, 0.72, 0.35
    height = top + len(ordered) * _BAR_HEIGHT + bottom
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        inner = (width - left - 3 * MARGIN) / width, len(ordered) * _BAR_HEIGHT / height
        axes = figure.add_axes((left / width, bottom / height, *inner))
        positions = range(len(ordered))
        bars = [colours[names.index(name)] for name, _ in ordered]
        axes.barh(positions, [value for _, value in ordered], height=0.7, color=bars)
        axes.set_yticks(positions, [drawable(name) for name, _ in ordered], size=7)
        axes.set(xlim=(0, 1), ylim=(len(ordered) - 0.5, -0.5), axisbelow=True)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        for position, (_, value) in enumerate(ordered):
            axes.text(min(value + 0.01, 0.94), position, f"{value:.2f}", va="center", size=7)
    return figure


def _drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = _SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
