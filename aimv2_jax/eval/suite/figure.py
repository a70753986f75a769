"""Figures of a suite: our accuracies beside the paper's by set, and by step of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from aimv2_jax.eval.suite.evaluate import ATTENTIVE, KNN, LINEAR, ZEROSHOT
from aimv2_jax.eval.suite.paper_sets import SIZES
from aimv2_jax.plotting import BLUE, DARK, GREEN, GREY, ORANGE, STYLE, draw_heading, drawable

_OURS = {ATTENTIVE: (BLUE, "o"), LINEAR: (ORANGE, "s"), KNN: (GREEN, "D"), ZEROSHOT: (DARK, "v")}
_LABELS = {ATTENTIVE: "attentive", LINEAR: "linear", KNN: "k-NN", ZEROSHOT: "zero-shot"}
_SHADES = ("#c9c9c9", "#a8a8a8", "#858585", "#5a5a5a")  # Light to dark: L to 3B.
_ROW, _HEAD, _LEFT, _BOTTOM, _WIDTH = 0.42, 1.25, 1.7, 0.55, 9.0  # Inches.


def suite_figure(table: Mapping[str, Any]) -> Figure:
    """One row a set: our probes with 95 % intervals, and marks for the paper's sizes."""
    rows = [entry for entry in table["sets"] if entry["results"] or entry["paper"]]
    height = _HEAD + _BOTTOM + _ROW * max(1, len(rows))
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure((_WIDTH, height), facecolor="white")
        model = table["model"]
        missing = f"; {len(table['missing'])} of the paper's 14 sets are missing" if table["missing"] else ""
        attentive = any(ATTENTIVE in entry["results"] for entry in rows)
        protocol = f"; attentive probe: {table['protocol']['name']}" if attentive else ""
        note = (
            f"{_shortened(model['source'])}, {model['resolution']}{protocol}\n"
            f"Top-1 with 95 % intervals; grey: AIMv2 L, H, 1B, 3B (arXiv 2411.14402){missing}."
        )
        draw_heading(figure, "Frozen features on labelled sets", note)
        box = (_LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + 0.3) / _WIDTH, 1 - (_HEAD + _BOTTOM) / height)
        axes = figure.add_axes(box)
        for position, entry in enumerate(rows):
            _draw_row(axes, position, entry)
        axes.set_yticks(range(len(rows)), [drawable(entry["title"]) for entry in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("top-1, %")
        axes.tick_params(axis="y", length=0)
        _draw_legend(axes, rows)
    return figure


def _draw_row(axes: Any, position: int, entry: Mapping[str, Any]) -> None:
    if entry["paper"]:
        for size, shade in zip(SIZES, _SHADES):
            axes.plot(entry["paper"][size], position, "|", color=shade, markersize=13, markeredgewidth=2, zorder=1)
    found = [probe for probe in _OURS if probe in entry["results"]]
    for index, probe in enumerate(found):
        result, (color, marker) = entry["results"][probe], _OURS[probe]
        low, high = result["ci95"]
        y = position + 0.16 * (index - (len(found) - 1) / 2)  # Side by side, so that intervals do not hide each other.
        axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.4, zorder=2)
        axes.plot(100 * result["top1"], y, marker, color=color, markersize=5, zorder=3)


def _draw_legend(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for probe, (color, marker) in _OURS.items():
        if any(probe in entry["results"] for entry in rows):
            axes.plot([], [], marker, color=color, markersize=5, label=_LABELS[probe])
    if any(entry["paper"] for entry in rows):
        for size, shade in zip(SIZES, _SHADES):
            axes.plot([], [], "|", color=shade, markersize=10, markeredgewidth=2, label=f"AIMv2-{size}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=8, frameon=False, fontsize=8, handletextpad=0.1,
                columnspacing=0.8, borderaxespad=0.1)  # fmt: skip


def _shortened(source: str, length: int = 50) -> str:
    """The end of a long path, which tells runs apart."""
    return drawable(source if len(source) <= length else f"…{source[-length:]}")


def steps_figure(source: str, tables: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Accuracy by step of a run, one line for each set and probe."""
    steps = sorted(tables)
    with rc_context(STYLE):
        figure = Figure((_WIDTH, 4.6), facecolor="white")
        draw_heading(figure, "Probes of each checkpoint", f"{_shortened(source, 100)}\nTop-1 with 95 % intervals.")
        axes = figure.add_axes((0.075, 0.12, 0.66, 0.7))
        titles = {entry["name"]: entry["title"] for step in steps for entry in tables[step]["sets"]}
        styles = ("-", "--", ":", "-.")
        for number, (name, title) in enumerate(titles.items()):
            for probe, (color, marker) in _OURS.items():
                points = [(step, result) for step in steps if (result := _result(tables[step], name, probe))]
                if not points:
                    continue
                x = [step for step, _ in points]
                low, high = ([100 * result["ci95"][end] for _, result in points] for end in (0, 1))
                y = [100 * result["top1"] for _, result in points]
                axes.fill_between(x, low, high, color=color, alpha=0.08, linewidth=0)
                label = f"{drawable(title)}, {_LABELS[probe]}"
                axes.plot(x, y, marker, linestyle=styles[number % 4], color=color, markersize=4, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("top-1, %", color=GREY)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=7)
    return figure


def _result(table: Mapping[str, Any], name: str, probe: str) -> Mapping[str, Any] | None:
    return next((entry["results"].get(probe) for entry in table["sets"] if entry["name"] == name), None)
