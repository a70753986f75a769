"""Charts beside the images of a contact sheet, with fixed heights in pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from aimv2_jax.plotting import BLUE, GREY, drawable

_SMALL, _NORMAL, _TITLE = 7, 8, 9  # Font sizes in points.
_PALE_BLUE = "#bcd2ea"


@dataclasses.dataclass(frozen=True)
class BarChart:
    """Vertical bars at 0, 1, …; `ticks` are labels by position (0.5: between two bars), `note` labels the axis."""

    title: str
    counts: Sequence[int]
    ticks: Mapping[float, str]
    note: str = ""

    indent = 36  # Pixels for the tick labels of the count axis.
    below = 38  # Pixels for the tick labels below and the note.
    height = 132

    def draw(self, axes: Axes) -> None:
        """Draws the chart; the title is flush left with the labels of the count axis."""
        count = len(self.counts)
        axes.set_title(self.title, loc="left", x=-self.indent / axes.get_window_extent().width, size=_TITLE)
        axes.bar(np.arange(count), self.counts, width=0.88, color=BLUE)
        axes.set_xticks(list(self.ticks), list(self.ticks.values()), size=_SMALL)
        spare = max(0.0, (5 - count) / 2)  # Keeps the bars narrow when there are few.
        axes.set_xlim(-0.7 - spare, count - 0.3 + spare)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(length=0, labelsize=_SMALL)
        axes.set_axisbelow(True)
        axes.set_xlabel(self.note, size=_SMALL, color=GREY, labelpad=2)


@dataclasses.dataclass(frozen=True)
class NameChart:
    """Counts by name, one line each with a bar behind it."""

    title: str
    counts: Mapping[str, int]

    indent = 0
    below = 14
    line = 22  # Height of a line in pixels.

    @property
    def height(self) -> int:
        return self.line * len(self.counts) + 8

    def draw(self, axes: Axes) -> None:
        """Draws the chart; the title is flush left with the names."""
        most = max(1, *self.counts.values())
        axes.set_title(self.title, loc="left", size=_TITLE)
        axes.barh(range(len(self.counts)), list(self.counts.values()), height=0.82, color=_PALE_BLUE)
        for index, (name, count) in enumerate(self.counts.items()):
            axes.text(most * 0.012, index, drawable(name), va="center", size=_NORMAL)
            axes.text(most * 0.995, index, f"{count:,}", va="center", ha="right", size=_NORMAL, color=GREY)
        axes.set_ylim(len(self.counts) - 0.5, -0.5)
        axes.set_xlim(0, most)
        axes.set_axis_off()
