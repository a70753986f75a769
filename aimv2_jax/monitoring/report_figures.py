"""Figures of a run's report: time by class, goodput, and training curves with events marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, StrMethodFormatter

from aimv2_jax.monitoring.events import Event
from aimv2_jax.monitoring.goodput import (
    CLASSES,
    DATA,
    DOWN,
    EVALUATION,
    LOST,
    OTHER,
    PRODUCTIVE,
    SAVING,
    START_UP,
    GoodputReport,
    Span,
)
from aimv2_jax.monitoring.report_facts import Facts, event_label, format_duration, format_percent
from aimv2_jax.plotting import BLUE, DARK, GREEN, GREY, ORANGE, STYLE

# Distinguishable with red-green colour blindness.
COLORS = {
    PRODUCTIVE: BLUE,
    LOST: "#e07b1f",
    START_UP: "#a98fd0",
    DATA: "#63c1d6",
    EVALUATION: "#8dbf6a",
    SAVING: "#ecd04f",
    DOWN: "#3b3b3b",
    OTHER: "#c9c9c9",
}
_WIDTH_INCHES = 9.0
_SPEED_TITLE = "Images per second"
_TIMELINE_BINS = 300
_LOG_RATIO = 10.0  # Positive values with a larger ratio of maximum to minimum get a logarithmic scale.
_MAX_LINES = 40  # Kinds with more marks get no lines through the plot, since they would hide the curves.
_MARK_WIDTH = 0.02  # Fraction of the plot's width.
_MAX_MARK_ROWS = 3

# Colour and marker of each marked kind of event. A restart is any `start` after the first.
_MARKS = {
    "start": ("#555555", "v"),
    "damaged": ("#7a3b12", "X"),
    "save_failed": ("#b08900", "s"),
    "preemption": ("#2c8f8f", "^"),
    "nonfinite": ("#c2185b", "*"),
    "spike": ("#d33a2c", "d"),
    "skip": ("#8e5bb5", "_"),
    "rewind": ("#8e5bb5", "<"),
    "hang": ("#000000", "P"),
    "device_failure": ("#1f3fbf", "D"),
    "worker_restarted": ("#6b8e23", "o"),
    "corruption": ("#ff1493", "h"),
}


@dataclasses.dataclass(frozen=True)
class _Curve:
    name: str
    lines: Sequence[Mapping[str, Any]]
    key: str
    color: str
    dotted: bool = False

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines if self.key in line]

    @property
    def values(self) -> np.ndarray:
        """Values at `steps`; null becomes NaN, which is drawn as a gap."""
        return np.array(
            [np.nan if line[self.key] is None else line[self.key] for line in self.lines if self.key in line]
        )


def timeline_figure(report: GoodputReport) -> Figure:
    """Shares of the time classes over the run's time; triangles mark starts."""
    unit_s, unit = _unit(report.total_s)
    edges_s, shares = _shares(report.spans, report.total_s)
    with rc_context(STYLE):
        figure = Figure((_WIDTH_INCHES, 2.5), facecolor="white")
        axes = figure.add_axes((0.065, 0.2, 0.915, 0.56))
        bottom = np.zeros(len(edges_s) - 1)
        present = [kind for kind in CLASSES if report.seconds[kind] > 1e-6 * report.total_s]
        for kind in present:
            top = bottom + shares[kind]
            x = edges_s / unit_s
            axes.fill_between(
                x, np.append(bottom, bottom[-1]), np.append(top, top[-1]), step="post", color=COLORS[kind], linewidth=0
            )
            bottom = top
        axes.set(xlim=(0, report.total_s / unit_s), ylim=(0, 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_xlabel(f"{unit} since the first start", color=GREY)
        axes.grid(False)
        begins = [start.begin_s / unit_s for start in report.starts]
        size = 5 if len(begins) <= 60 else 2.5
        axes.plot(begins, [1.045] * len(begins), "v", color=DARK, markersize=size, clip_on=False)
        handles = [Patch(color=COLORS[kind], label=kind) for kind in present]
        handles.append(Line2D([], [], color=DARK, marker="v", linestyle="", markersize=5, label="start"))
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.055, 1.0), ncols=9, fontsize=8.5,
                      frameon=False, handlelength=1, handleheight=1, columnspacing=1.1)  # fmt: skip
    return figure


def _shares(spans: Sequence[Span], total_s: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of equal time bins, and the share of every class in each bin."""
    edges_s = np.linspace(0.0, total_s, _TIMELINE_BINS + 1)
    width_s = total_s / _TIMELINE_BINS
    sums = {kind: np.zeros(_TIMELINE_BINS) for kind in CLASSES}
    for span in spans:
        first = min(int(span.begin_s / width_s), _TIMELINE_BINS - 1)
        last = min(int(span.end_s / width_s), _TIMELINE_BINS - 1)
        bins = np.arange(first, last + 1)
        inside = np.minimum(span.end_s, edges_s[bins + 1]) - np.maximum(span.begin_s, edges_s[bins])
        for kind, seconds in span.seconds.items():
            sums[kind][bins] += np.maximum(inside, 0.0) * (seconds / (span.end_s - span.begin_s))
    return edges_s, {kind: values / width_s for kind, values in sums.items()}


def _unit(seconds: float) -> tuple[float, str]:
    for unit_s, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit_s:
            return unit_s, name
    return 1.0, "seconds"


def goodput_figure(report: GoodputReport) -> Figure:
    """Left: time by class. Right: productive steps and time, each with the expectation for the save interval."""
    with rc_context(STYLE):
        figure = Figure((_WIDTH_INCHES, 2.6), facecolor="white")
        axes = figure.add_axes((0.09, 0.06, 0.37 if report.expected else 0.76, 0.84))
        rows = np.arange(len(CLASSES))
        shares = [report.seconds[kind] / report.total_s for kind in CLASSES]
        axes.barh(rows, shares, color=[COLORS[kind] for kind in CLASSES], height=0.72)
        for row, kind, share in zip(rows, CLASSES, shares):
            text = f"{format_percent(share)}   {format_duration(report.seconds[kind])}"
            axes.text(share + 0.015, row, text, va="center", size=8.5)
        axes.set_yticks(rows, CLASSES)
        axes.set_title("Time by class", loc="left")
        axes.set(xlim=(0, 1.8 * max(shares)), ylim=(len(CLASSES) - 0.5, -0.5))
        _hide_axes(axes)
        if report.expected is not None:
            _draw_expected(figure.add_axes((0.63, 0.06, 0.36, 0.84)), report)
    return figure


def _draw_expected(axes: Axes, report: GoodputReport) -> None:
    expected = report.expected
    actual_steps = expected.reached_steps * expected.steps
    rows = [
        ("productive steps", actual_steps, BLUE),
        ("  expected", expected.steps, "#b9c9dd"),
        ("productive time", report.goodput, BLUE),
        ("  expected", expected.time, "#b9c9dd"),
    ]
    heights = np.array([0, 0.85, 2.3, 3.15])
    axes.barh(heights, [share for _, share, _ in rows], color=[color for *_, color in rows], height=0.72)
    for y, (_, share, color) in zip(heights, rows):
        text_color = "white" if color == BLUE else DARK
        axes.text(share - 0.015, y, format_percent(share), va="center", ha="right", size=8.5, color=text_color)
    for y, reached in ((1.52, expected.reached_steps), (3.82, expected.reached_time)):
        axes.text(0.012, y, f"{format_percent(reached)} of what is expected", va="center", size=8.5, color=GREY)
    axes.set_yticks(heights, [name for name, *_ in rows])
    axes.set_title("Actual and expected goodput", loc="left")
    axes.set(xlim=(0, 1), ylim=(4.2, -0.5))
    _hide_axes(axes)


def _hide_axes(axes: Axes) -> None:
    axes.grid(False)
    axes.set_xticks([])
    axes.tick_params(length=0, labelcolor=DARK)
    axes.spines["bottom"].set_visible(False)


def curves_figure(facts: Facts) -> Figure | None:
    """Losses, learning rate, gradient norm and speed over steps, with events marked; None if there are no metrics."""
    training, evaluation = facts.training, facts.evaluation
    panels = [
        ("Loss", [
            _Curve("training", training, "loss", GREY),
            _Curve("held-out", evaluation, "eval_loss", ORANGE, dotted=True),
            _Curve("held-out, averaged parameters", evaluation, "eval_loss_ema", BLUE, dotted=True),
        ]),
        ("Image loss", [
            _Curve("training", training, "loss_image", GREY),
            _Curve("held-out", evaluation, "eval_loss_image", ORANGE, dotted=True),
        ]),
        ("Text loss (nats a token)", [
            _Curve("training", training, "loss_text", GREY),
            _Curve("held-out", evaluation, "eval_loss_text", ORANGE, dotted=True),
            _Curve("held-out, full image", evaluation, "eval_loss_text_full_prefix", BLUE, dotted=True),
        ]),
        ("Gradient norm", [_Curve("gradient norm", training, "grad_norm", GREEN)]),
        ("Learning rate", [_Curve("learning rate", training, "lr", GREEN)]),
        (_SPEED_TITLE, [_Curve("images per second", training, "images_per_s", GREEN)]),
    ]  # fmt: skip
    panels = [
        (title, [curve for curve in curves if curve.steps and np.isfinite(curve.values).any()])
        for title, curves in panels
    ]
    panels = [(title, curves) for title, curves in panels if curves]
    if not panels:
        return None
    marks = marked_events(facts.events)
    rows = -(-len(panels) // 2)
    with rc_context(STYLE):
        legend_rows = -(-len(marks) // 6)
        head = 0.3 + 0.2 * legend_rows
        height = (2.6 if marks else 2.45) * rows + head
        figure = Figure((_WIDTH_INCHES, height), facecolor="white")
        grid = figure.subplots(rows, 2, squeeze=False)
        figure.subplots_adjust(
            left=0.065,
            right=0.985,
            top=1 - (head + (0.4 if marks else 0.12)) / height,
            bottom=0.4 / height,
            hspace=0.5 if marks else 0.42,
            wspace=0.17,
        )
        steps = [line["step"] for line in (*training, *evaluation)]
        low, high = min(steps), max(max(steps), min(steps) + 1)
        limits = (0 if low < 0.1 * high else low), high
        for axes, (title, curves) in zip(grid.flat, panels):
            mark_rows = _draw_marks(axes, marks, limits)
            _draw_panel(axes, title, curves, limits, from_zero=title == _SPEED_TITLE)
            axes.set_title(axes.get_title(loc="left"), loc="left", pad=5 + 8.5 * mark_rows)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        if marks:
            figure.legend(
                handles=[_handle(kind, len(events)) for kind, events in marks.items()],
                loc="upper left", bbox_to_anchor=(0.055, 1.0), ncols=6, fontsize=8.5, frameon=False, handletextpad=0.3,
                columnspacing=1.2,
            )  # fmt: skip
    return figure


def marked_events(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Events to mark in the curves, by kind: restarts and failures."""
    marked: dict[str, list[Event]] = {}
    first_run = events[0].run if events else None
    for event in events:
        if event.kind in _MARKS and not (event.kind == "start" and event.run == first_run):
            marked.setdefault(event.kind, []).append(event)
    return {kind: marked[kind] for kind in _MARKS if kind in marked}


def _draw_marks(axes: Axes, marks: Mapping[str, Sequence[Event]], limits: tuple[int, int]) -> int:
    """Draws lines through the plot and marks above it, in several rows if they overlap; returns the number of rows."""
    steps_and_kinds = [(event.step, kind) for kind, events in marks.items() for event in events]
    ends = [-np.inf]  # Step of the last mark in each row.
    rows: dict[tuple[str, int], list[int]] = {}
    for step, kind in sorted(steps_and_kinds, key=lambda mark: mark[0]):
        free = [row for row, end in enumerate(ends) if step - end > _MARK_WIDTH * (limits[1] - limits[0])]
        row = free[0] if free else len(ends) % _MAX_MARK_ROWS
        ends[row:] = [step, *ends[row + 1 :]]
        rows.setdefault((kind, row), []).append(step)
    for (kind, row), steps in rows.items():
        color, marker = _MARKS[kind]
        axes.plot(
            steps, [1.035 + 0.065 * row] * len(steps), marker, color=color, markersize=4.5, linestyle="",
            transform=axes.get_xaxis_transform(), clip_on=False, markeredgewidth=0.8,
        )  # fmt: skip
    for kind, events in marks.items():
        color = _MARKS[kind][0]
        for event in events if len(events) <= _MAX_LINES else ():
            axes.axvline(event.step, color=color, linewidth=0.7, alpha=0.4, zorder=0)
        for event in events:
            a, b = event.values.get("a"), event.values.get("b")
            if kind in ("rewind", "skip") and isinstance(a, int) and isinstance(b, int):
                axes.axvspan(a, b, color=color, alpha=0.14, linewidth=0, zorder=0)
    return len(ends) if steps_and_kinds else 0


def _handle(kind: str, count: int) -> Line2D:
    color, marker = _MARKS[kind]
    name = "restart" if kind == "start" else event_label(kind)
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=5, label=f"{name} ({count:,})")


def _draw_panel(axes: Axes, title: str, curves: Sequence[_Curve], limits: tuple[int, int], from_zero: bool) -> None:
    for curve in curves:
        style = {"marker": "o", "markersize": 3.2, "linewidth": 1.5} if curve.dotted else {"linewidth": 1.0}
        if len(curve.steps) == 1:
            style = {"marker": "o", "markersize": 3.2, "linewidth": 1.0}
        axes.plot(curve.steps, curve.values, color=curve.color, label=curve.name, **style)
    finite = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    is_log = finite.min() > 0 and finite.max() / finite.min() > _LOG_RATIO
    if is_log:
        axes.set_yscale("log")
        is_narrow = finite.max() / finite.min() < 300
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0 if from_zero else None)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(*limits)
    axes.set_title(f"{title}{', logarithmic' if is_log else ''}", loc="left")
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("step", size=8, color=GREY, labelpad=1)
    if len(curves) > 1:
        axes.legend(fontsize=8, loc="best")
