"""Shared matplotlib style, headings, and text that the available fonts can draw; needs no display."""

from __future__ import annotations

import colorsys
import functools
import textwrap
import unicodedata

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

Pixels = UInt8[np.ndarray, "H W 3"]
"""An image to be drawn."""

DARK, GREY, BLUE, ORANGE, GREEN = "#222222", "#777777", "#1f5fa8", "#d9731a", "#3d8f4f"
MARGIN = 0.15  # Inches.
_NOT_COUNTED = (128, 128, 128)  # Pixels of a mask or depth map.
_GOLDEN = 0.618033988749895  # Steps of the hue by the golden ratio keep neighbouring classes apart.
_MAX_WRAPPED_CHARS = 1000  # Longer texts are cut before they are wrapped, which takes time.

# The first font comes with matplotlib and covers Latin, Greek, Cyrillic, Arabic, Hebrew. The others are used for other
# scripts where they are installed.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans", "Noto Sans Devanagari",
    "Noto Sans Thai", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Malgun Gothic", "Arial Unicode MS", "Unifont",
)  # fmt: skip
FONTS = [name for name in _FONTS if name in {font.name for font in fontManager.ttflist}]

STYLE = {
    "font.family": FONTS,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid.axis": "y",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "text.color": "#222222",
    "text.parse_math": False,  # A caption may contain dollar signs.
}


@functools.cache
def class_colours() -> UInt8[np.ndarray, "256 3"]:
    """A colour for each class of a mask; class 0 is dark, and 255, which usually does not count, grey."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(1, 255):
        lightness = (0.5, 0.68, 0.36)[index % 3]
        colours[index] = [round(255 * part) for part in colorsys.hls_to_rgb(index * _GOLDEN % 1, lightness, 0.75)]
    colours[0], colours[255] = (40, 40, 48), _NOT_COUNTED
    colours.flags.writeable = False  # All callers share the array.
    return colours


def depth_colours(shares: np.ndarray, counted: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Depths as shares of the greatest one, bright where near; what is not `counted` is grey. Both are [H, W]."""
    colours = (255 * matplotlib.colormaps["magma_r"](shares.clip(0, 1))[..., :3]).astype(np.uint8)
    colours[~counted] = _NOT_COUNTED
    return colours


def draw_heading(figure: Figure, title: str, note: str) -> None:
    """Draws a title and a note of one or two lines in the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(MARGIN / width, 1 - 0.12 / height, title, va="top", size=13, weight="bold")
    figure.text(MARGIN / width, 1 - 0.4 / height, note, va="top", color=GREY, linespacing=1.3)


def counted(count: int, thing: str) -> str:
    """A count with its noun in the singular or plural, such as "1 step" or "2 steps"."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def drawable(text: str) -> str:
    """Returns `text` on one line, with an escape such as \\u65e5 for every character that no font can draw."""
    return "".join(
        char if char.isprintable() and ord(char) in _drawable_codes() else char.encode("unicode_escape").decode("ascii")
        for char in " ".join(text.split())
    )


@functools.cache
def _drawable_codes() -> set[int]:
    """Code points that the fonts have in regular and in bold."""

    def codes(weight: str) -> set[int]:
        fonts = [get_font(findfont(FontProperties(family=[name], weight=weight))) for name in FONTS]
        return set().union(*(font.get_charmap() for font in fonts))

    return codes("normal") & codes("bold")


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Breaks drawable `text` into lines of `width` characters; the last line ends in … if text was cut off.

    East Asian characters count as two.
    """
    text = drawable(text[:_MAX_WRAPPED_CHARS])
    padded = "".join(f"{char}\0" if unicodedata.east_asian_width(char) in "WF" else char for char in text)
    lines = textwrap.wrap(padded, width)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1][: width - 2].rstrip()} …"]
    return [line.replace("\0", "") for line in lines]
