"""The fit of a study from its run folders: the points used, the files written, and the figures."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from aimv2_jax.errors import EXIT_FINISHED, EXIT_USER, UserError
from experiments.scaling.figures import Point, loss_against_compute, loss_against_samples, short
from experiments.scaling.fit import main, read_points
from experiments.scaling.law import Law
from experiments.scaling.study import STUDIES, plan
from tests.helpers.study_runs import write_run

LAW = Law(E=1.6, A=60.0, a=0.35, B=40.0, b=0.45)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with all runs of the miniature study finished and losses that follow a law."""
    workdir = tmp_path_factory.mktemp("study")
    for run in plan(STUDIES["miniature"], workdir):
        loss = float(LAW.loss(run.parameters[0], run.samples))
        write_run(run, eval_loss=loss, eval_loss_text=loss / 2)
    return workdir


@pytest.fixture
def copied(study, tmp_path):
    return shutil.copytree(study, tmp_path / "study")


def points_of(law: Law) -> list[Point]:
    sizes, counts = {"a": 1_000_000, "b": 3_000_000, "c": 9_000_000}, (1000, 4000, 16_000)
    return [
        Point(name, size, count, 6.0 * size * count, float(law.loss(size, count)))
        for name, size in sizes.items()
        for count in counts
    ]


def test_main_when_a_study_is_finished_then_its_law_is_written_with_both_figures(study, tmp_path, capsys):
    assert main([f"--workdir={study}", f"--output={tmp_path / 'out'}"]) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert "b = 0.45  (95%: 0.4" in output
    assert output.count("residual +0.0000") + output.count("residual -0.0000") == 12
    written = json.loads((tmp_path / "out/fit.json").read_text())
    assert written["values"] == pytest.approx(dataclasses.asdict(LAW), rel=1e-4)
    assert written["intervals"].keys() == written["values"].keys() and written["left_out"] == []
    points = written["points"]
    assert [(point["size"], point["samples"]) for point in points[:5]] == [
        *(("nano", count) for count in (1024, 2048, 4096, 8192)),
        ("micro", 1024),
    ]
    assert points[-1]["parameters"] == 2_782_272 and points[-1]["flops"] == pytest.approx(1.27e13, rel=0.01)
    for name in ("loss_by_samples", "loss_by_compute"):
        pixels = imread(tmp_path / f"out/{name}.png")
        assert pixels.shape[:2] == (720, 960) and pixels[..., :3].std() > 0.05


def test_points_when_some_runs_are_not_finished_then_left_out_by_name(copied):
    runs = {run.name: run for run in plan(STUDIES["miniature"], copied)}
    for name in ("nano/cooldown_51", "tiny/cooldown_205", "micro/cooldown_410"):
        shutil.rmtree(runs[name].workdir)
    write_run(runs["nano/cooldown_51"], step=60)
    write_run(runs["tiny/cooldown_205"])
    points, left_out = read_points(copied, "eval_loss")
    assert len(points) == 9
    assert left_out == ["nano/cooldown_51: not finished", "tiny/cooldown_205: no eval_loss after its last step"]


def test_points_when_another_loss_is_asked_for_then_it_is_read(study):
    whole, text = (read_points(study, name)[0] for name in ("eval_loss", "eval_loss_text"))
    assert [point.loss / 2 for point in whole] == [point.loss for point in text]


def test_points_when_measured_on_different_data_then_refused(copied):
    run = plan(STUDIES["miniature"], copied, [("eval.max_examples", "7")])[1]
    shutil.rmtree(run.workdir)
    write_run(run, eval_loss=3.0)
    with pytest.raises(UserError, match="measured on different data"):
        read_points(copied, "eval_loss")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir=/nowhere/at/all"], "--workdir: no such folder"),
        (["--workdir={empty}"], "no point of the study: 'no cooldown was begun'"),
        (["--workdir={study}", "--loss=eval_loss_smell"], "no eval_loss_smell after its last step"),
    ],
)
def test_main_when_there_is_nothing_to_fit_then_one_sentence(study, tmp_path, capsys, flags, words):
    assert main([flag.format(empty=tmp_path, study=study) for flag in flags]) == EXIT_USER
    assert words in capsys.readouterr().err


def test_figures_when_drawn_then_a_series_a_size_with_its_points_and_the_law():
    points = points_of(LAW)
    for figure, x_of in (
        (loss_against_samples(points, LAW, "held-out loss", "note"), lambda point: point.samples),
        (loss_against_compute(points, LAW, "held-out loss", "note"), lambda point: point.flops),
    ):
        [axes] = figure.axes
        dots = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
        assert list(dots) == ["a, 1M parameters", "b, 3M parameters", "c, 9M parameters"]
        for label, line in dots.items():
            own = [point for point in points if point.size == label[0]]
            assert line.get_xdata().tolist() == [x_of(point) for point in own]
            assert line.get_ydata().tolist() == [point.loss for point in own]
        curves = [line for line in axes.lines if line.get_marker() != "o" and len(line.get_xdata()) == 100]
        ends = sorted(curve.get_ydata()[-1] for curve in curves)
        assert ends == pytest.approx(sorted(point.loss for point in points if point.samples == 16_000))


def test_compute_figure_when_drawn_then_its_envelope_lies_below_all_points():
    points = points_of(LAW)
    [axes] = loss_against_compute(points, LAW, "held-out loss", "note").axes
    [line] = [line for line in axes.lines if line.get_label() == "envelope"]
    flops, losses = line.get_xdata(), line.get_ydata()
    assert (np.diff(losses) < 0).all()
    for point in points:
        assert np.interp(point.flops, flops, losses) <= point.loss + 1e-3
    assert flops[0] == pytest.approx(6e9) and flops[-1] == pytest.approx(6.0 * 9e6 * 16_000)


def test_short_when_any_size_then_two_digits_and_a_unit():
    assert [short(count) for count in (7, 8192, 304_576, 2_782_272, 309_197_824, 6.4e9)] == [
        *("7", "8.2k", "305k", "2.8M", "309M", "6.4B")
    ]
