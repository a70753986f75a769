"""Figure of a run's metrics over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from aimv2_jax.plotting import BLUE, GREEN, GREY, ORANGE, STYLE

_PANELS = {
    "Loss": ("loss", "eval_loss", "eval_loss_ema"),
    "Image loss": ("loss_image", "eval_loss_image"),
    "Text loss (nats a token)": ("loss_text", "eval_loss_text", "eval_loss_text_full_prefix"),
    "Contrastive loss": ("loss_contrastive", "eval_loss_contrastive"),
    "Feature loss against the teacher": ("loss_features", "eval_loss_features"),
    "Logit loss against the teacher": ("loss_logits", "eval_loss_logits"),
    "Pixel loss against the teacher": ("loss_pixels", "eval_loss_pixels"),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr",),
    "Images per second": ("images_per_s",),
    "Model FLOPs utilisation": ("mfu",),
    "Share of time waiting for data": ("data_wait_fraction",),
}
_RATES = ("images_per_s", "mfu", "data_wait_fraction")  # Drawn from zero.
_LOGARITHMIC = ("grad_norm",)  # Drawn on a logarithmic scale, if it has several decades.
_LOG_RATIO = 10.0  # Ratio of maximum to minimum from which a scale is logarithmic.
_FEW = 40  # Up to so many points get markers, and up to so many marks are opaque.


def curves_figure(lines: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[int]]) -> Figure | None:
    """Metrics over steps, with vertical lines at marked steps by label; None if there are no metrics."""
    panels = {}
    for title, names in _PANELS.items():
        for name in names:
            known = [(line["step"], line[name]) for line in lines if name in line]
            points = np.array(known, float).reshape(-1, 2)  # None becomes NaN, which is drawn as a gap.
            if np.isfinite(points[:, 1]).any():
                panels.setdefault(title, {})[name] = points
    if not panels:
        return None
    rows = math.ceil(len(panels) / 2)
    with rc_context(STYLE):
        figure = Figure((9.0, 2.2 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False).flat
        for (title, curves), axes in zip(panels.items(), grid):
            handles = _draw_panel(axes, title, curves, marks)
        for axes in grid:
            axes.remove()
        figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=8, frameon=False)
    return figure


def _draw_panel(
    axes: Axes, title: str, curves: Mapping[str, np.ndarray], marks: Mapping[str, Sequence[int]]
) -> list[Line2D]:
    """Draws curves and marks; returns the legend's handles of the marks."""
    colors = (GREY, ORANGE, BLUE) if len(curves) > 1 else (GREEN,)
    for (name, points), color in zip(curves.items(), colors):
        axes.plot(*points.T, color=color, marker="." if len(points) <= _FEW else "", linewidth=1.2, label=name)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    if not curves.keys().isdisjoint(_RATES):
        axes.set_ylim(bottom=0)
    values = np.concatenate([points[:, 1] for points in curves.values()])
    values = values[np.isfinite(values)]
    if not curves.keys().isdisjoint(_LOGARITHMIC) and 0 < values.min() * _LOG_RATIO < values.max():
        axes.set_yscale("log", subs=(3,))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.set_title(title, loc="left")
    handles = []
    for index, (label, steps) in enumerate(marks.items()):
        x = np.repeat(np.array(steps, float), 3)
        y = np.tile([0.0, 1 - 0.04 * index, np.nan], len(steps))  # Lines of different heights, to tell them apart.
        alpha = 0.8 if len(steps) <= _FEW else 0.15
        style = {"color": f"C{index + 3}", "alpha": alpha, "linewidth": 0.8, "marker": ".", "markevery": (1, 3)}
        handles += axes.plot(x, y, transform=axes.get_xaxis_transform(), zorder=1.6, label=label, **style)
    return handles
