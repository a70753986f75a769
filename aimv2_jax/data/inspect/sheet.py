"""Contact sheet: a grid of images with texts, beside it facts and histograms.

The layout is in pixels, so that every image pixel is one pixel of the PNG (or a square of several).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

from aimv2_jax.plotting import BLUE, DARK, FONTS, GREY, ORANGE, STYLE, Pixels, draw_heading, wrap

IMAGE_SIDE = 224  # Pixels to which an image is enlarged or reduced.
MAX_IMAGE_SIDE = 448  # Training images between IMAGE_SIDE and this are shown at their size.

_DOTS_PER_INCH = 100
# Sizes in pixels.
_MARGIN = 15
_GAP = 16
_HEAD_HEIGHT = 76
_PANEL_WIDTH = 330
_CHART_HEIGHT = 204
_MIN_TILE_WIDTH = 200
_LINE_HEIGHT = 13
# Lines of a monospaced font can be broken by counting characters.
_FONT = {"family": ["DejaVu Sans Mono", *FONTS], "size": 7}
_CHARACTER_WIDTH = 6

Line = tuple[str, str, str]
"""(text, colour, weight)."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """An image (or the text `problem` if there is none) with a title, a subtitle, and paragraphs by label."""

    title: str
    subtitle: str
    texts: Mapping[str, Sequence[str]]
    image: Pixels | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class BarChart:
    """Counts, drawn as one labelled bar each; `note` names the axis of the labels."""

    title: str
    labels: Sequence[str]
    counts: Sequence[int]
    note: str


def magnified(image: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel as a square of side `factor`."""
    return image.repeat(factor, 0).repeat(factor, 1)


def fitted(image: Pixels, side: int = IMAGE_SIDE) -> Pixels:
    """Fits an image into a square of `side` pixels: a large one reduced, a small one magnified by an integer."""
    if max(image.shape[:2]) <= side:
        return magnified(image, side // max(image.shape[:2]))
    height, width = _reduced(image.shape[:2], side)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX, reducing_gap=None))


def fitted_values(values: np.ndarray, side: int = IMAGE_SIDE) -> np.ndarray:
    """Fits a map [H, W] as `fitted` fits an image, but takes the nearest value, since means of values are no values."""
    if max(values.shape) <= side:
        return magnified(values, side // max(values.shape))
    rows, columns = (
        (np.arange(new) + 0.5) * old // new for old, new in zip(values.shape, _reduced(values.shape, side))
    )
    return values[np.ix_(rows.astype(np.intp), columns.astype(np.intp))]


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    return tuple(max(1, round(length * side / max(size))) for length in size)


def contact_sheet(
    tiles: Sequence[Tile], facts: Mapping[str, Sequence[str]], charts: Sequence[BarChart], title: str, note: str
) -> Figure:
    """The sheet: `tiles` row by row, and `facts` (paragraphs by label) and `charts` to their right."""
    shapes = [tile.image.shape for tile in tiles if tile.image is not None] or [(IMAGE_SIDE, IMAGE_SIDE)]
    box_height = max(shape[0] for shape in shapes)
    box_width = max(_MIN_TILE_WIDTH, *(shape[1] for shape in shapes))
    columns = _columns(len(tiles), box_width, box_height)
    texts = [
        _lines(tile.title, box_width, 2, weight="bold")
        + _lines(tile.subtitle, box_width, 2, GREY)
        + _labelled_lines(tile.texts, box_width)
        for tile in tiles
    ]
    fact_lines = _labelled_lines(facts, _PANEL_WIDTH)
    row_heights = [
        box_height + 5 + _LINE_HEIGHT * max(map(len, texts[start : start + columns])) + _GAP
        for start in range(0, len(tiles), columns)
    ]
    panel_heights = [_LINE_HEIGHT * len(fact_lines)] + [_CHART_HEIGHT] * len(charts)
    grid_width = columns * (box_width + _GAP)
    width = _MARGIN + grid_width + _GAP + _PANEL_WIDTH + _MARGIN
    notes = wrap(note, int(width / 7.5), 3)
    head = _HEAD_HEIGHT + 16 * (len(notes) - 1)
    body = max(sum(row_heights), sum(panel_heights)) + _MARGIN
    with rc_context(STYLE):
        figure = Figure((width / _DOTS_PER_INCH, (head + body) / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH, facecolor="white")
        draw_heading(figure, "".join(wrap(title, width // 13, 1)), "\n".join(notes))
        parts = figure.subfigures(
            2, 5, height_ratios=[head, body], width_ratios=[_MARGIN, grid_width, _GAP, _PANEL_WIDTH, _MARGIN]
        )
        for axes, tile, lines in zip(_subplots(parts[1, 1], row_heights, body, columns), tiles, texts):
            _draw_tile(figure, axes, tile, lines, box_width, box_height)
        fact_axes, *chart_axes = _subplots(parts[1, 3], panel_heights, body)
        _draw_lines(fact_axes, 0, 0, fact_lines)
        for axes, chart in zip(chart_axes, charts):
            _draw_chart(axes.inset_axes((0.11, 0.18, 0.89, 0.65)), chart)
    return figure


def _columns(count: int, width: int, height: int) -> int:
    """Number of columns that makes the grid about 4:3 and leaves few cells empty."""
    ideal = max(1, min(count, round(math.sqrt(count * 4 / 3 * (height + 90) / width))))
    candidates = [columns for columns in (ideal, ideal - 1, ideal + 1) if 1 <= columns <= count]
    return min(candidates, key=lambda columns: -count % columns)


def _lines(text: str, width: int, max_lines: int, color: str = DARK, weight: str = "normal") -> list[Line]:
    return [(line, color, weight) for line in wrap(text, width // _CHARACTER_WIDTH, max_lines)]


def _labelled_lines(texts: Mapping[str, Sequence[str]], width: int) -> list[Line]:
    lines: list[Line] = []
    for label, paragraphs in texts.items():
        lines += _lines(label, width, 2, BLUE, "bold")
        for paragraph in paragraphs:
            lines += _lines(paragraph.strip() or "(nothing)", width, 4)
    return lines


def _subplots(part: SubFigure, row_heights: Sequence[int], height: int, columns: int = 1) -> list[Axes]:
    """Subplots without gaps, row by row, and empty ones below to fill `height`; their coordinates are in pixels."""
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0, "hspace": 0}
    ratios = [*row_heights, height - sum(row_heights)]
    subplots = part.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios, gridspec_kw=edges)
    for axes in subplots.flat:
        axes.set(xlim=(0, axes.bbox.width), ylim=(axes.bbox.height, 0))
        axes.set_axis_off()
    return list(subplots.flat)


def _draw_tile(figure: Figure, axes: Axes, tile: Tile, lines: Sequence[Line], box_width: int, box_height: int) -> None:
    axes.add_patch(Rectangle((0, 0), box_width, box_height, color="#f1f1f1", linewidth=0))
    if tile.image is None:
        _draw_lines(axes, 10, 12, _lines(tile.problem, box_width - 20, 5, ORANGE, "bold"))
    else:
        height, width = tile.image.shape[:2]
        x = (box_width - width) // 2
        y = (box_height - height) // 2
        frame = Rectangle((x - 1, y - 1), width + 2, height + 2, color="#cccccc", linewidth=0, clip_on=False)
        axes.add_patch(frame)
        # A figure's image is not resampled, unlike that of a subplot.
        bottom = round(axes.bbox.y1) - y - height
        figure.figimage(tile.image, round(axes.bbox.x0) + x, bottom, origin="upper", zorder=1)
    _draw_lines(axes, 0, box_height + 5, lines)


def _draw_lines(axes: Axes, x: int, y: int, lines: Sequence[Line]) -> None:
    for index, (text, color, weight) in enumerate(lines):
        axes.text(x, y + index * _LINE_HEIGHT, text, va="top", color=color, weight=weight, clip_on=True, **_FONT)


def _draw_chart(axes: Axes, chart: BarChart) -> None:
    """Draws the bars; if their labels are too long for the axis, only every n-th, with that of the tallest bar."""
    count = len(chart.counts)
    step = -(-sum(map(len, chart.labels)) // 36)
    first = int(np.argmax(chart.counts)) % step
    spare = max(0.0, (5 - count) / 2)  # Keeps the bars narrow when there are few.
    axes.bar(range(count), chart.counts, width=0.88, color=BLUE)
    axes.set_title(chart.title, loc="left", x=-0.12, size=9)
    axes.set_xlabel(chart.note, size=7, color=GREY, labelpad=2)
    axes.set_xlim(-0.7 - spare, count - 0.3 + spare)
    axes.set_xticks(range(first, count, step), chart.labels[first::step])
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(length=0, labelsize=7, labelcolor="#555555")
    axes.set_axisbelow(True)
