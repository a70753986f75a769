"""The study of dense probes: scenes with their masks and depths, its tables, and the benchmark of its input."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.transforms.maps import decode_map
from aimv2_jax.errors import UserError
from experiments import dense_scenes, dense_study
from experiments.benchmarks import dense_input
from experiments.dense_scenes import CLASSES, SIZE, CutOut


def cut_out(label):
    """A red ring with a transparent middle."""
    y, x = np.mgrid[:60, :40]
    radius = np.hypot((x - 20) / 20, (y - 30) / 30)
    pixels = np.zeros((60, 40, 4), np.uint8)
    pixels[(radius < 1) & (radius > 0.4)] = (255, 0, 0, 255)
    return CutOut(Image.fromarray(pixels), label)


def test_mask_of_scene_is_where_cut_outs_are():
    """On a blue photograph the pixels of a cut-out are those of its class, also through its holes."""
    photographs = [Image.new("RGB", (300, 200), (0, 0, 255))]
    cut_outs = [cut_out(label) for label in range(1, len(CLASSES))]
    found = set()
    for number in range(6):
        scene, mask = dense_scenes.pasted_scene(cut_outs, photographs, np.random.default_rng(number))
        assert scene.size == (SIZE, SIZE) and mask.shape == (SIZE, SIZE)
        red = np.asarray(scene)[..., 0] > 127
        assert (red == (mask > 0)).mean() > 0.995  # All but pixels at edges, whose colours are mixed.
        found |= set(np.unique(mask))
    assert len(found) > 5
    again, _ = dense_scenes.pasted_scene(cut_outs, photographs, np.random.default_rng(5))
    assert again.tobytes() == scene.tobytes()


def test_room_recedes_to_its_wall():
    """Depths fall to the foot of the image, end at the wall, and survive as millimetres in a record."""
    for number in range(4):
        _, depth = dense_scenes.rendered_room(np.random.default_rng(number))
        assert 5 <= depth[0].max() <= 9 and depth.min() > 1
        assert np.median(depth[-1]) < 0.8 * np.median(depth[0])
    [record] = dense_scenes.rendered_records("train", 1, 0)
    values = decode_map(record.images["depth"])
    assert values.dtype == np.uint16 and values.shape == (SIZE, SIZE) and 1000 < values.min() < values.max() <= 9000


def test_cut_outs_are_read_from_pairs(tmp_path):
    """Images of the categories with a partly transparent background are cut-outs; the others are left."""
    ring = dense_scenes.encoded(cut_out(1).image)
    full = dense_scenes.encoded(Image.new("RGBA", (40, 40), (9, 9, 9, 255)))
    for source in dense_scenes.CUT_OUTS:
        (tmp_path / source / "train").mkdir(parents=True)
        with tarfile.open(tmp_path / source / "train/00000.tar", "w") as tar:
            for key, (category, image) in enumerate((("food", ring), ("space", ring), ("plant", full))):
                for suffix, data in (("json", json.dumps({"coarse": category}).encode()), ("png", image)):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    found = dense_scenes.read_cut_outs(tmp_path, "train")
    assert [CLASSES[cut.label] for cut in found] == ["food"] * len(dense_scenes.CUT_OUTS)
    assert all(cut.image.size == (39, 59) for cut in found)  # Less the transparent border.
    with pytest.raises(UserError, match="--pairs has no such tar"):
        dense_scenes.read_cut_outs(tmp_path, "test")


def test_study_tables_have_every_model(tmp_path):
    """The tables have a row for each model with intervals, and IoU by class."""
    for index, model in enumerate(dense_study.MODELS):
        low = 0.5 - index / 10
        figures = dict.fromkeys(("miou", "rmse", "abs_rel", "delta1", "accuracy", "mean_accuracy"), low)
        figures |= {f"{name}_ci95": [low - 0.1, low + 0.1] for name in ("miou", "rmse", "abs_rel", "delta1")}
        figures["iou"] = dict.fromkeys(CLASSES[:-1], low)
        for task in ("segmentation", "depth"):
            (tmp_path / f"{task}_{model}.json").write_text(json.dumps(figures))
    lines = dense_study.markdown(tmp_path).splitlines()
    assert lines[2] == "| AIMv2 | 0.500 | 0.400 to 0.600 | 0.500 | 0.500 |"
    assert lines[9].startswith("| the same architecture at random weights | 0.400 | 0.300 to 0.500 | 0.400 |")
    assert lines[-1] == "| the colours of each patch |" + " 0.30 |" * 9 + " 0.00 |"


def test_dense_input_measures_its_rows(monkeypatch, tmp_path, capsys):
    """The benchmark runs on tiny photographs, and writes a rate for each row."""
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(dense_input, "_IMAGES", 3)
    monkeypatch.setattr(dense_input, "_SIZE", (64, 48))
    monkeypatch.setattr(dense_input, "_SMALLER", (48, 32))
    monkeypatch.setattr(dense_input, "rate", lambda rows, seconds: float(next(rows)))
    assert dense_input.main([f"--json={tmp_path}/rates.json"]) == 0
    rates = json.loads((tmp_path / "rates.json").read_text())
    expected = {"training crops": 16.0, "test windows": 8.0, "features": 32.0}
    expected |= {f"{name}, resized on the host": rows for name, rows in expected.items()}
    assert rates == expected | dict.fromkeys(
        ("training crops, not resized", "training, whole images", "training crops of 512 px"), 16.0
    )
    assert "test windows: 8 images a second" in capsys.readouterr().out
