"""Matplotlib figures without a display: image grids, images beside text, training curves."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from aimv2_jax.plotting import BLUE, DARK, GREY, MARGIN, STYLE, Pixels, draw_heading, drawable

# All in inches.
_IMAGE_WIDTH = 1.3
_MIN_FIGURE_WIDTH = 7  # Room for headings.
_LABEL_HEIGHT = 0.21
_LINE_HEIGHT = 0.155


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of images under a title; columns of one `group` are close together under the group's name."""

    group: str
    title: str
    images: Sequence[Pixels]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a panel: `name` in the legend, and values by step (None: missing)."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    color: str = DARK
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot over steps."""

    title: str
    curves: Sequence[Curve]
    scale: str = "linear"


def image_grid(columns: Sequence[Column], heading: str, note: str) -> Figure:
    """Columns of images side by side, one row per example."""
    gap, head, title = 0.22, 0.82, 0.5
    lefts, x = [], MARGIN
    for index, column in enumerate(columns):
        if index:
            x += 0.04 if column.group == columns[index - 1].group else gap
        lefts.append(x)
        x += _IMAGE_WIDTH
    rows = max(len(column.images) for column in columns)
    width, height = max(x + MARGIN, _MIN_FIGURE_WIDTH), head + title + rows * (_IMAGE_WIDTH + 0.05) + MARGIN
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        top = height - head - title
        for index, (column, x) in enumerate(zip(columns, lefts)):
            middle = (x + _IMAGE_WIDTH / 2) / width
            figure.text(middle, (top + 0.08) / height, column.title, ha="center", color=GREY)
            if index == 0 or column.group != columns[index - 1].group:
                last = max(i for i, other in enumerate(columns) if other.group == column.group)
                middle = (x + lefts[last] + _IMAGE_WIDTH) / 2 / width
                figure.text(middle, (top + 0.28) / height, column.group, ha="center", weight="bold")
            for row, image in enumerate(column.images):
                _draw_image(figure, image, x, top - row * (_IMAGE_WIDTH + 0.05), _IMAGE_WIDTH)
    return figure


def image_cards(
    images: Sequence[Pixels], texts: Sequence[Mapping[str, str]], heading: str, note: str, columns: int = 2
) -> Figure:
    """Images with their texts to the right, each text under its label; the first text is highlighted."""
    side, text_width, head = 1.45, 3.15, 0.75
    columns = min(columns, len(images))
    card = side + 0.15 + text_width
    blocks = [
        [(label, _wrapped(text, bold=index == 0)) for index, (label, text) in enumerate(lines.items())]
        for lines in texts
    ]
    tall = max(sum(_LABEL_HEIGHT + _LINE_HEIGHT * len(lines) for _, lines in block) for block in blocks)
    pitch = max(side, tall) + 0.22
    width = max(columns * card + 2 * MARGIN, _MIN_FIGURE_WIDTH)
    height = head + -(-len(images) // columns) * pitch + MARGIN
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        for index, (image, block) in enumerate(zip(images, blocks)):
            row, column = divmod(index, columns)
            x, y = MARGIN + column * card, height - head - row * pitch
            _draw_image(figure, image, x, y, side)
            left = (x + side + 0.12) / width
            for text_index, (label, lines) in enumerate(block):
                color, weight = (DARK, "normal") if text_index else (BLUE, "bold")
                figure.text(left, y / height, label, va="top", size=7, color=GREY)
                figure.text(left, (y - 0.13) / height, "\n".join(lines), va="top", color=color, weight=weight)
                y -= _LABEL_HEIGHT + _LINE_HEIGHT * len(lines)
    return figure


def _wrapped(text: str, bold: bool) -> list[str]:
    """`text` in at most three lines of a card's width."""
    return textwrap.wrap(drawable(text), 37 if bold else 42, max_lines=3, placeholder=" …") or ["(nothing)"]


def curve_panels(panels: Sequence[Panel], heading: str, note: str, marked_step: int, columns: int = 3) -> Figure:
    """Plots over the steps of a run; a dotted line marks one step."""
    rows = -(-len(panels) // columns)
    width, head = 4.0 * columns, 0.9
    height = head + 2.75 * rows
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(
            left=0.055, right=0.985, top=1 - (head + 0.15) / height, bottom=0.45 / height, hspace=0.42, wspace=0.2
        )
        for axes, panel in zip(grid.flat, panels):
            _draw_panel(axes, panel, marked_step)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, marked_step: int) -> None:
    for curve in panel.curves:
        values = np.array([np.nan if value is None else value for value in curve.values], float)
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6} if curve.marked else {"linewidth": 1.1}
        axes.plot(curve.steps, values, color=curve.color, label=curve.name, **style)
    axes.axvline(marked_step, color=GREY, linestyle=":", linewidth=1)
    axes.set_title(panel.title, loc="left")
    axes.set_yscale(panel.scale)
    if panel.scale == "log":
        formatter = LogFormatter(minor_thresholds=(1, 0.4))
        axes.yaxis.set_minor_formatter(formatter)
    else:
        formatter = StrMethodFormatter("{x:g}")
    axes.yaxis.set_major_formatter(formatter)
    axes.margins(x=0.01)
    axes.tick_params(length=0)
    axes.set_xlabel("step", size=8, color=GREY, labelpad=1)
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, loc="upper right")


def _draw_image(figure: Figure, image: Pixels, x: float, top: float, side: float) -> Any:
    """Draws an image of `side` inches with its upper left corner at `x`, `top`."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, (top - side) / height, side / width, side / height))
    axes.imshow(image, interpolation="nearest")
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.6)
    return axes
