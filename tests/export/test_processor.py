"""The exported image processor, `load_encoder` and the evaluation of a run see the same pixels."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_images import write_images

from aimv2_jax.data.batches import CenterView
from aimv2_jax.data.clock import StageClock
from aimv2_jax.data.pictures import open_picture
from aimv2_jax.eval.encoders import LoadedEncoder
from aimv2_jax.export.transformers import processor_json
from aimv2_jax.export.vision import Vision

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="extra [test]")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"), 100)


def vision_of(size: int) -> Vision:
    """A model of square images of `size` pixels, of which the processor's file tells no more."""
    return Vision(
        width=8,
        depth=1,
        heads=1,
        hidden=8,
        patch_size=1,
        image_size=size,
        position="sincos",
    )


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # All three by transformers' own loading,
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # which leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [57, 224])
def test_processor_when_given_paths_then_equal_bytes(images, tmp_path, size):
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_json(vision_of(size))))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.backend == "pil"  # There is no torchvision here; see tests/interop.
    encoder = LoadedEncoder("none", vision_of(size), {}, None)
    for path in images if size == 57 else images[:46]:  # Each way of writing twice.
        [pixels] = processor([str(path)], do_rescale=False, do_normalize=False)["pixel_values"]
        assert pixels.dtype == np.uint8 and pixels.shape == (3, size, size)
        picture = open_picture(path.read_bytes())
        with Image.open(path) as image:
            seen = {
                "path": encoder.pixels(path),
                "image": encoder.pixels(image),
                "array": encoder.pixels(np.asarray(picture.whole())),
                "evaluation": CenterView(size)(picture, 0, 0, StageClock()),
            }
        for how, ours in seen.items():
            np.testing.assert_array_equal(ours, pixels.transpose(1, 2, 0), f"{path.name} as {how}")
