"""Matplotlib figures without a display: image grids, and images beside text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from aimv2_jax.plotting import BLUE, DARK, GREY, MARGIN, STYLE, Pixels, draw_heading, drawable

# All in inches.
_IMAGE_WIDTH = 1.3
_MIN_FIGURE_WIDTH = 7  # Room for headings.
_ROW_GAP = 0.05
_LABEL_HEIGHT = 0.21
_LINE_HEIGHT = 0.155


def image_grid(groups: Sequence[tuple[str, Mapping[str, Sequence[Pixels]]]], heading: str, note: str) -> Figure:
    """Columns of images, one row per example: (group's title, {column's title: images}) of each group of columns."""
    side = _IMAGE_WIDTH
    inner_gap, group_gap = 0.04, 0.22
    head, title = 0.82, 0.5
    widths = [len(columns) * (side + inner_gap) - inner_gap for _, columns in groups]
    rows = max(len(images) for _, columns in groups for images in columns.values())
    width = max(sum(widths) + group_gap * (len(groups) - 1) + 2 * MARGIN, _MIN_FIGURE_WIDTH)
    height = head + title + rows * (side + _ROW_GAP) + MARGIN
    with rc_context(STYLE):
        figure = Figure((width, height), facecolor="white")
        draw_heading(figure, heading, note)
        left, top = MARGIN, height - head - title
        for (group, columns), group_width in zip(groups, widths):
            middle = (left + group_width / 2) / width
            figure.text(middle, (top + 0.28) / height, group, ha="center", weight="bold")
            for index, (column, images) in enumerate(columns.items()):
                x = left + index * (side + inner_gap)
                figure.text((x + side / 2) / width, (top + 0.08) / height, column, ha="center", color=GREY)
                for row, image in enumerate(images):
                    _draw_image(figure, image, x, top - row * (side + _ROW_GAP), side)
            left += group_width + group_gap
    return figure


def image_cards(images: Sequence[Pixels], texts: Sequence[Mapping[str, str]], heading: str, note: str) -> Figure:
    """Images with their texts to the right, each text under its label; the first text is highlighted."""
    side, text_width, head = 1.45, 3.15, 0.75
    columns = min(2, len(images))
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


def _draw_image(figure: Figure, image: Pixels, x: float, top: float, side: float) -> None:
    """Draws an image of `side` inches with its upper left corner at `x`, `top`."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, (top - side) / height, side / width, side / height))
    axes.imshow(image, interpolation="nearest")
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.6)
