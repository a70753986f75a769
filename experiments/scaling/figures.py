"""Figures of the scaling study: loss by samples for each size, and loss by compute with the envelope."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from aimv2_jax.plotting import DARK, GREY, STYLE, draw_heading
from experiments.scaling.law import Law, envelope

_FONT_SIZE_PT = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished cooldown: name and encoder parameters of its size, samples, FLOPs as a separate run, held-out loss."""

    size: str
    parameters: int
    samples: int
    flops: float
    loss: float


def loss_against_samples(points: Sequence[Point], law: Law, name: str, note: str) -> Figure:
    """Draws points and law for each size; the dotted line is the law's loss at infinite samples."""
    with rc_context(STYLE):
        figure, axes = _canvas(f"{name} against samples".capitalize(), note)
        for size, color in _sizes(points):
            samples = np.geomspace(size[0].samples, size[-1].samples, 100)
            _curve(axes, size, color, lambda point: point.samples, samples, law.loss(size[0].parameters, samples))
            limit = law.E + law.A / size[0].parameters ** law.a
            axes.axhline(limit, color=color, linestyle=":", linewidth=0.9)
        _finish(axes, "samples seen, including the cooldown", name)
        counts = sorted({point.samples for point in points})
        axes.set_xticks(counts, [short(count) for count in counts])
    return figure


def loss_against_compute(points: Sequence[Point], law: Law, name: str, note: str) -> Figure:
    """Draws points and law for each size over FLOPs, with the envelope: the law's loss of the best size by compute."""
    with rc_context(STYLE):
        figure, axes = _canvas(f"{name} against compute".capitalize(), note)
        sizes = _sizes(points)
        for size, color in sizes:
            flops = np.geomspace(size[0].flops, size[-1].flops, 100)
            per_sample = size[0].flops / size[0].samples
            losses = law.loss(size[0].parameters, flops / per_sample)
            _curve(axes, size, color, lambda point: point.flops, flops, losses)
        flops = np.geomspace(min(point.flops for point in points), max(point.flops for point in points), 200)
        costs = [(size[0].parameters, size[0].flops / size[0].samples) for size, _ in sizes]
        axes.plot(flops, envelope(law, costs, flops), color=DARK, linewidth=2.2, alpha=0.85, zorder=1, label="envelope")
        _finish(axes, "FLOPs of a separate run", name)
    return figure


def _sizes(points: Sequence[Point]) -> list[tuple[list[Point], tuple]]:
    """Groups points by size, in increasing order of size and samples, with a colour for each group."""
    names = {point.parameters: point.size for point in points}
    groups = [
        sorted((point for point in points if point.parameters == count), key=lambda point: point.samples)
        for count in sorted(names)
    ]
    shades = colormaps["viridis"](np.linspace(0.05, 0.8, len(groups)))
    return list(zip(groups, map(tuple, shades)))


def _canvas(heading: str, note: str) -> tuple[Figure, Axes]:
    figure = Figure((6.4, 4.8), facecolor="white")
    draw_heading(figure, heading, note)
    axes = figure.add_axes((0.1, 0.105, 0.87, 0.7))
    return figure, axes


def _curve(
    axes: Axes,
    size: Sequence[Point],
    color: tuple,
    x_of: Callable[[Point], float],
    x: np.ndarray,
    losses: np.ndarray,
) -> None:
    axes.plot(x, losses, color=color, linewidth=1.4)
    label = f"{size[0].size}, {short(size[0].parameters)} parameters"
    axes.plot(
        [x_of(point) for point in size],
        [point.loss for point in size],
        color=color,
        linestyle="",
        marker="o",
        markersize=5,
        label=label,
    )


def _finish(axes: Axes, x_label: str, name: str) -> None:
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, which="both")
    axes.set_xlabel(x_label, size=_FONT_SIZE_PT, color=GREY, labelpad=1)
    axes.set_ylabel(name, size=_FONT_SIZE_PT, color=GREY, labelpad=1)
    axes.legend(fontsize=_FONT_SIZE_PT, loc="upper right")


def short(count: float) -> str:
    """Formats 1234567 as 1.2M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2g}{unit}" if count < 100 * size else f"{count / size:.0f}{unit}"
    return f"{count:g}"
