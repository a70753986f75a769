"""Shared matplotlib style, headings, and text that the available fonts can draw; needs no display."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

Pixels = UInt8[np.ndarray, "H W 3"]
"""An image to be drawn."""

DARK, GREY, BLUE, ORANGE, GREEN = "#222222", "#777777", "#1f5fa8", "#d9731a", "#3d8f4f"
MARGIN = 0.15  # Inches.

# The first font comes with matplotlib and covers Latin, Greek, Cyrillic, Arabic, Hebrew. The others are used for other
# scripts where they are installed.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Unifont",
)
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
    return "".join(char if _has_glyph(char) else _escaped(char) for char in " ".join(text.split()))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=1 << 16)
def _has_glyph(char: str) -> bool:
    return char.isprintable() and any(get_font(file).get_char_index(ord(char)) for file in _font_files())


@functools.lru_cache(maxsize=1)
def _font_files() -> tuple[str, ...]:
    return tuple(findfont(FontProperties(family=[name])) for name in FONTS)


def wrap(text: str, width: float, measure: Callable[[str], float], most_lines: int) -> list[str]:
    """Breaks `text` into lines of at most `width` by `measure`; the last line ends in … if text was cut off.

    Breaks at spaces and after / _ -, and anywhere in a word that is wider than a line (also in scripts without spaces).
    """
    lines = [""]
    for part in re.findall(r"\s*[^\s/_-]*[/_-]*", text):
        while part and len(lines) < most_lines + 2:
            joined = f"{lines[-1]}{part}".lstrip()
            if measure(joined) <= width:
                lines[-1], part = joined, ""
            elif lines[-1] and (
                measure(part.strip()) <= width or _fitting(joined, width, measure) <= len(lines[-1]) + 1
            ):
                lines.append("")
            else:
                fits = _fitting(joined, width, measure)
                lines[-1], part = joined[:fits], joined[fits:]
                lines.append("")
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    return [*lines[: most_lines - 1], f"{last[: _fitting(last, width - measure(' …'), measure)].rstrip()} …"]


def _fitting(text: str, width: float, measure: Callable[[str], float]) -> int:
    """The number of characters of `text` that fit, at least one."""
    low, high = 1, max(1, len(text))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle]) <= width else (low, middle - 1)
    return low
