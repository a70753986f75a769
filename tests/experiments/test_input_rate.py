"""The input benchmark runs, and its images resemble photographs. No rates are checked: machines differ."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks import input_rate, input_rows, photos

PROGRAM = Path(__file__).parents[2] / "experiments/benchmarks/input_rate.py"


def test_input_rate_when_run_then_one_object_a_row_and_a_table(make_dataset, tmp_path):
    rows = ["bare loop", "pipeline", "PIL"]
    folder = make_dataset("noise", 12)
    command = [sys.executable, PROGRAM, "--input", folder, "--rows", *rows, "--one-core", "--rounds=1", "--seconds=0.1"]
    done = subprocess.run([*command, "--json", tmp_path / "rate.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = json.loads((tmp_path / "rate.json").read_text())
    rates = [line for line in lines if line["name"] != "quality"]
    assert {line["name"] for line in rates} == set(rows)
    for line in rates:
        assert line["images_per_s"] > 0 and line["size_px"] < 60 and line["cores"] == 1
        if line["name"] == "pipeline":
            assert set(line["stages"]) == {"read", "caption", "decode", "resize", "patchify", "rest"}
            assert 50 < line["worker_mib"] < 400
        else:
            assert line["stages"] == {} and line["worker_mib"] is None
    assert [line["ratio_to_bare"] for line in rates if line["name"] == "bare loop"] == [1.0]
    assert [line["target_px"] for line in lines if line["name"] == "quality"] == [224, 336, 448]
    assert (tmp_path / "rate.md").read_text() == done.stdout and "| PIL |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is too small"),
        (["--seconds", "nan"], "--seconds is out of range"),
        (["--rows", "PIL"], "--rows lacks the reference row"),
        (["--input", "nowhere"], "nowhere"),
    ],
)
def test_input_rate_when_asked_for_nonsense_then_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["input_rate.py", *arguments])
    assert input_rate.main() == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_examples_same_and_within_images(make_dataset):
    """Examples taken twice are the same, and their boxes are within their images."""
    config = input_rows.config_of(make_dataset("noise", 12), 1)
    examples = input_rows.examples(config)
    assert examples == input_rows.examples(config)
    for data, (left, top, right, bottom) in examples:
        with Image.open(io.BytesIO(data)) as image:
            assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height


def test_photo_when_made_then_as_seeded_with_a_photographs_spectrum_and_size():
    one, again, other = (photos.photo(np.random.default_rng(seed), 512, 384) for seed in (0, 0, 1))
    assert one == again != other
    grey = np.asarray(one.convert("L"), float)
    window = np.outer(np.hanning(384), np.hanning(512))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(384)[:, None], np.fft.fftfreq(512))
    edges = np.geomspace(0.01, 0.4, 9)
    mean = [power[(frequency >= low) & (frequency < high)].mean() for low, high in itertools.pairwise(edges)]
    slope = np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0]
    assert -3.5 < slope < -2
    buffer = io.BytesIO()
    one.save(buffer, "JPEG", quality=photos.QUALITY)
    assert 1 < 8 * len(buffer.getvalue()) / (512 * 384) < 2
