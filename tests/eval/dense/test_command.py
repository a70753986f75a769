"""The command: a dense probe of a small encoder learns, and what cannot work is said in one line."""

import dataclasses
import json
import re

import jax
import pytest
from PIL import Image

from aimv2_jax.eval.dense.__main__ import main
from aimv2_jax.export.hf_export import write_folder
from aimv2_jax.pretrained.source import open_weights


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The command takes all local devices; for one the programs compile in half the time."""
    device = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: device)


@pytest.fixture(scope="module")
def native(workdir, tmp_path_factory):
    """An export of the run's encoder as one of native resolution."""
    folder = tmp_path_factory.mktemp("native")
    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=30)
    write_folder(folder, dataclasses.replace(weights, spec=spec, shapes=spec.shapes()), "float32", 10**9)
    return folder


def run(data, checkpoint, name, *flags):
    folders = [f"--train={data}/{name}/train", f"--test={data}/{name}/test"]
    return main([f"--checkpoint={checkpoint}", *folders, *flags])


def test_segmentation_on_windows(workdir, dense_data, tmp_path, capsys):
    """Crops in training, windows and mirror images in the test: discs are found, and the figures are drawn."""
    (tmp_path / "names").write_text("none\nred\ngreen\nblue\nblack\n")
    flags = [
        "--task=segmentation",
        "--classes=5",
        "--map=mask",
        "--image-size=48",
        "--flip-test",
        f"--names={tmp_path}/names",
    ]
    flags += ["--steps=60", "--batch-size=8", "--rate=0.02", "--scale-range", "0.9", "1.2", "--layers=1,2"]
    files = [f"--json={tmp_path}/m.json", f"--predictions={tmp_path}/p.png", f"--bars={tmp_path}/b.png"]
    assert run(dense_data, workdir, "discs", *flags, *files, "--encoder-batch=8") == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["miou"] > 0.6 and result["miou_ci95"][0] <= result["miou"] <= result["miou_ci95"][1]
    assert set(result["iou"]) == {"none", "red", "green", "blue"} and result["accuracy"] > 0.9
    assert result["examples"] == {"train": 24, "test": 10} and result["settings"]["steps"] == 60
    for name in ("p.png", "b.png"):
        with Image.open(tmp_path / name) as drawn:
            assert drawn.size[0] > 300
    output = capsys.readouterr().out
    assert "--train has no pixel of 1 of 5 classes: black" in output
    assert "segmentation: mIoU" in output and "10 test images" in output and "best: " in output


def test_depth_of_whole_images(native, dense_data, tmp_path, capsys):
    """Whole images at two scales: the depth of a ramp, which is its grey, is found."""
    flags = ["--task=depth", "--map=depth", "--steps=120", "--batch-size=8", "--rate=0.05", "--scales", "1", "1.2"]
    files = [f"--json={tmp_path}/m.json", f"--predictions={tmp_path}/p.png"]
    assert run(dense_data, native, "ramps", *flags, *files, "--encoder-batch=8", "--bins=16") == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["rmse"] < 0.8 and result["delta1"] > 0.4 and result["rmse_ci95"][0] < result["rmse"]
    assert "depth: RMSE" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--task or --settings is required"),
        (["--settings=nyuv2", "--task=segmentation"], "--settings nyuv2 is for --task depth"),
        (["--task=depth", "--bars=x.png"], "--bars are for --task segmentation"),
        (["--task=depth", "--depths", "9", "1"], "--depths does not rise: '9.0 1.0'"),
        (["--task=segmentation", "--classes=256"], "--classes is above 255"),
        (["--task=segmentation", "--classes=2"], "samples have a label out of range, such as: 'disc/.*Give --classes"),
        (["--task=segmentation", "--layers=7"], "--layers is unknown: '7'. Give last, four, or blocks from 1 to 2"),
        (["--task=segmentation", "--area=9"], "sin-cos"),
        (["--task=segmentation", "--area=9", "--image-size=48"], "exclude each other"),
        (["--task=segmentation", "--like=x"], "go together"),
        (["--task=segmentation", "--names={folder}/names"], "--names has 2 different names for 4 classes"),
        (["--task=segmentation", "--json={folder}/none/m.json"], "no such folder"),
        (["--task=depth"], "have a depth map of 8 bits"),
    ],
)
def test_dense_user_errors(workdir, dense_data, tmp_path, capsys, arguments, sentence):
    """A command that cannot work ends with one line and code 2."""
    (tmp_path / "names").write_text("a\nb\n")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    try:
        code = run(dense_data, workdir, "discs", "--map=mask", *arguments)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2 and re.search(sentence, error) and len(error.strip().splitlines()) == 1
