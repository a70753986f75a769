"""Hugging Face's own classes load our exports."""

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2_jax import load_encoder
from aimv2_jax.export import __main__ as hf
from aimv2_jax.export.hf_export import write_folder
from aimv2_jax.export.verify import sample_images
from aimv2_jax.pretrained.encoder import encoder_of
from aimv2_jax.pretrained.source import open_weights
from tests.helpers.real_images import write_images

# The tests import transformers themselves: it takes seconds, which test collection should not spend.
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="extra [test]")

# Largest difference of float32 features in units of the largest entry, as in test_golden.py.
TOLERANCE = 2e-5


def load_theirs(folder: Path):
    import transformers

    model, report = transformers.Aimv2VisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def run_theirs(model, pixels: np.ndarray) -> np.ndarray:
    """`pixels` are normalised, [N, 3, H, W]."""
    import torch

    with torch.no_grad():
        return model(pixel_values=torch.from_numpy(pixels)).last_hidden_state.numpy()


def normalised(encoder, pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(value, np.float32) for value in (encoder.spec.pixel_mean, encoder.spec.pixel_std))
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_model_when_exported_then_transformers_sees_the_same_features(workdir, tmp_path):
    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/hf"]) == 0
    model, encoder, images = load_theirs(tmp_path / "hf"), load_encoder(workdir), sample_images()
    ours = encoder(images)
    for image, features in zip(images, ours):
        assert_close(features[None], run_theirs(model, normalised(encoder, encoder.pixels(image))), TOLERANCE)


# All three come from transformers' own image loading, which leaves files open.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_processor_when_given_paths_then_features_agree(workdir, tmp_path):
    from transformers import AutoImageProcessor

    images = [str(path) for path in write_images(tmp_path, 46)]
    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/hf"]) == 0
    model, encoder = load_theirs(tmp_path / "hf"), load_encoder(workdir)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = run_theirs(model, np.stack(processor(images, return_tensors="np")["pixel_values"]))
    assert_close(encoder(images), theirs, TOLERANCE)


def test_card_when_its_lines_are_run_on_a_smaller_type_then_features(workdir, tmp_path, monkeypatch):
    import torch

    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/hf", "--dtype=bfloat16"]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    sample_images()[0].save("image.jpg")
    names: dict = {}
    exec(code.replace("PATH", "hf"), names)
    assert names["features"].shape == (1, 16, 32) and names["features"].dtype == torch.bfloat16


def test_native_model_when_exported_then_transformers_sees_the_same_at_any_grid(workdir, tmp_path):
    from transformers import AutoImageProcessor

    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=20)
    weights = dataclasses.replace(weights, spec=spec, shapes=spec.shapes())
    write_folder(tmp_path, weights, "float32", 10**9)
    model, encoder = load_theirs(tmp_path), encoder_of(weights)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    for image in sample_images():
        [ours] = encoder([image])
        pixels = encoder.pixels(image)
        theirs = run_theirs(model, processor([Image.fromarray(pixels)], return_tensors="np")["pixel_values"])
        assert_close(ours.reshape(1, -1, ours.shape[-1]), theirs, TOLERANCE)
