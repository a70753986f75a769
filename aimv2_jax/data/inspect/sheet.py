"""Contact sheet layout in matplotlib: a grid of images with texts, beside it facts and histograms.

The layout is in pixels, so that every image pixel is one pixel of the PNG (or a square of several).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image

from aimv2_jax.data.inspect.charts import BarChart, NameChart
from aimv2_jax.plotting import BLUE, DARK, FONTS, GREY, ORANGE, STYLE, Pixels, draw_heading, drawable, wrap

DOTS_PER_INCH = 100
IMAGE_SIDE = 224  # Pixels to which an image is enlarged or reduced.
MAX_IMAGE_SIDE = 448  # Training images between IMAGE_SIDE and this are shown at their size.

# All in pixels.
_MARGIN, _GAP, _HEAD, _PANEL, _TEXT = 15, 16, 76, 330, 200
_LINE, _LABEL = 14, 13  # Heights of a line of text and of a label.
_SMALL, _NORMAL = 7, 8  # Font sizes in points.
_MAX_LETTERS = 1000  # Longer texts are cut before they are measured, which takes time.
_FACT_GAP = 4
_CHART_HEAD = 34  # Height of a chart's title with the space above it.


@dataclasses.dataclass(frozen=True)
class Tile:
    """An image (or the text `problem` if there is none) with a title, a subtitle, and texts by label."""

    title: str
    subtitle: str
    texts: Mapping[str, str]
    image: Pixels | None = None
    problem: str = ""


def magnified(image: Pixels, factor: int) -> Pixels:
    """Repeats every pixel as a square of side `factor`."""
    return image.repeat(factor, 0).repeat(factor, 1)


def fitted(image: Pixels, side: int = IMAGE_SIDE) -> Pixels:
    """Fits an image into a square of `side` pixels: a large one reduced, a small one magnified by an integer."""
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= side:
        return magnified(image, side // longest)
    size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, reducing_gap=None))


def contact_sheet(
    tiles: Sequence[Tile],
    facts: Mapping[str, str],
    charts: Sequence[BarChart | NameChart],
    title: str,
    note: str,
) -> Figure:
    """The sheet: `tiles` row by row, and facts and charts to their right."""
    with rc_context(STYLE):
        return _Sheet(tiles, facts, charts).draw(title, note)


def save(figure: Figure, path: Path) -> None:
    """Writes the sheet as PNG, in the resolution of its layout."""
    with rc_context(STYLE):
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png")


Line = tuple[str, float, str, str, int]
"""(text, size in points, colour, weight, height in pixels)."""


class _Sheet:
    def __init__(self, tiles: Sequence[Tile], facts: Mapping[str, str], charts: Sequence[BarChart | NameChart]):
        self._tiles = tiles
        self._charts = charts
        self._figure = Figure(dpi=DOTS_PER_INCH, facecolor="white")
        self._renderer = FigureCanvasAgg(self._figure).get_renderer()
        shapes = [tile.image.shape for tile in tiles if tile.image is not None] or [(IMAGE_SIDE, IMAGE_SIDE)]
        self._box_height, self._box_width = (max(sizes) for sizes in list(zip(*shapes))[:2])
        self._width = max(self._box_width, _TEXT)
        self._columns = _columns(len(tiles), self._width, self._box_height)
        self._lines = [self._tile_lines(tile) for tile in tiles]
        self._facts = [self._fact_lines(name, value) for name, value in facts.items()]
        self._row_heights = [
            self._box_height + 5 + max(_height(lines) for lines in self._lines[start : start + self._columns])
            for start in range(0, len(tiles), self._columns)
        ]

    def draw(self, title: str, note: str) -> Figure:
        panel_left = _MARGIN + self._columns * (self._width + _GAP) + _GAP
        width = panel_left + _PANEL + _MARGIN
        notes = self._wrap(note, width - 2 * _MARGIN, 9, "normal", 3)
        head = _HEAD + 16 * (len(notes) - 1)
        tiles_height = sum(self._row_heights) + _GAP * (len(self._row_heights) - 1)
        panel_height = sum(_height(lines) + _FACT_GAP for lines in self._facts)
        panel_height += sum(_CHART_HEAD + chart.height + chart.below for chart in self._charts)
        self._height = head + max(tiles_height, panel_height) + _MARGIN
        self._figure.set_size_inches(width / DOTS_PER_INCH, self._height / DOTS_PER_INCH)
        self._total_width = width
        [title] = self._wrap(title, width - 2 * _MARGIN, 13, "bold", 1) or [""]
        draw_heading(self._figure, title, "\n".join(notes))
        self._draw_tiles(head)
        self._draw_panel(panel_left, head)
        return self._figure

    def _draw_tiles(self, top: int) -> None:
        for index, (tile, lines) in enumerate(zip(self._tiles, self._lines)):
            row, column = divmod(index, self._columns)
            x, y = _MARGIN + column * (self._width + _GAP), top + sum(self._row_heights[:row]) + row * _GAP
            self._rectangle(x, y, self._width, self._box_height, "#f1f1f1")
            if tile.image is None:
                for offset, line in enumerate(self._wrap(tile.problem, self._width - 20, 9, "bold", 5)):
                    self._text(x + 10, y + 12 + 16 * offset, (line, 9, ORANGE, "bold", 16))
            else:
                height, width = tile.image.shape[:2]
                left, above = x + (self._width - width) // 2, y + (self._box_height - height) // 2
                self._rectangle(left - 1, above - 1, width + 2, height + 2, "#cccccc")
                self._figure.figimage(tile.image, left, self._height - above - height, origin="upper")
            self._text_lines(x, y + self._box_height + 5, lines)

    def _draw_panel(self, x: int, y: int) -> None:
        for lines in self._facts:
            self._text_lines(x, y, lines)
            y += _height(lines) + _FACT_GAP
        for chart in self._charts:
            y += _CHART_HEAD
            chart.draw(self._axes(x + chart.indent, y, _PANEL - chart.indent, chart.height))
            y += chart.height + chart.below

    def _tile_lines(self, tile: Tile) -> list[Line]:
        lines = [
            (line, _NORMAL, DARK, "bold", _LINE) for line in self._wrap(tile.title, self._width, _NORMAL, "bold", 2)
        ]
        lines += [
            (line, _SMALL, GREY, "normal", _LABEL)
            for line in self._wrap(tile.subtitle, self._width, _SMALL, "normal", 2)
        ]
        for label, text in tile.texts.items():
            labels = self._wrap(label, self._width, _SMALL, "bold", 2)
            lines += [(line, _SMALL, BLUE, "bold", _LABEL) for line in labels]
            wrapped = self._wrap(text, self._width, _NORMAL, "normal", 4) or ["(nothing)"]
            lines += [(line, _NORMAL, DARK, "normal", _LINE) for line in wrapped]
        return lines

    def _fact_lines(self, name: str, value: str) -> list[Line]:
        lines: list[Line] = [(name, _SMALL, BLUE, "bold", _LABEL)]
        for part in value.split("\n"):
            lines += [(line, _NORMAL, DARK, "normal", _LINE) for line in self._wrap(part, _PANEL, _NORMAL, "normal", 3)]
        return lines

    def _wrap(self, text: str, width: float, points: float, weight: str, most_lines: int) -> list[str]:
        font = FontProperties(family=FONTS, size=points, weight=weight)

        def measure(part: str) -> float:
            return self._renderer.get_text_width_height_descent(part, font, False)[0]

        return wrap(drawable(text[:_MAX_LETTERS]), width, measure, most_lines)

    def _text_lines(self, x: int, y: int, lines: Sequence[Line]) -> None:
        for line in lines:
            self._text(x, y, line)
            y += line[4]

    def _text(self, x: int, y: int, line: Line) -> None:
        text, points, color, weight, _ = line
        self._figure.text(
            x / self._total_width, 1 - y / self._height, text, va="top", size=points, color=color, weight=weight
        )

    def _rectangle(self, x: int, y: int, width: int, height: int, color: str) -> None:
        left, bottom, *size = self._to_figure_coords(x, y, width, height)
        self._figure.add_artist(Rectangle((left, bottom), *size, color=color, linewidth=0, zorder=-1))

    def _axes(self, x: int, y: int, width: int, height: int) -> Axes:
        return self._figure.add_axes(self._to_figure_coords(x, y, width, height))

    def _to_figure_coords(self, x: int, y: int, width: int, height: int) -> tuple[float, float, float, float]:
        """A box in pixels from the upper left corner, in matplotlib's figure coordinates."""
        across, down = self._total_width, self._height
        return x / across, 1 - (y + height) / down, width / across, height / down


def _columns(count: int, width: int, height: int) -> int:
    """Number of columns that makes the grid about 4:3 and leaves few cells empty."""
    ideal = max(1, min(count, round(math.sqrt(count * 4 / 3 * (height + 90) / width))))
    candidates = [columns for columns in (ideal, ideal - 1, ideal + 1) if 1 <= columns <= count]
    return min(candidates, key=lambda columns: -count % columns)


def _height(lines: Sequence[Line]) -> int:
    return sum(line[4] for line in lines)
