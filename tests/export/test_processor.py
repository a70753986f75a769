"""The exported image processor, `load_encoder` and a run's evaluation compute the same pixels."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.transforms.decode import open_encoded
from aimv2_jax.data.transforms.views import View
from aimv2_jax.export.folder import processor_json
from aimv2_jax.pretrained.encoder import PretrainedEncoder
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from tests.helpers.real_images import write_images

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="extra [test]")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"), 100)


def spec_of(size: int) -> EncoderSpec:
    """A model of square images of `size` pixels; the processor's file depends on nothing else."""
    return EncoderSpec(
        width=8,
        depth=1,
        heads=1,
        hidden=8,
        patch_size=1,
        image_size=size,
        position="sincos",
    )


# All three come from transformers' own image loading, which leaves files open.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [57, 224])
def test_processor_when_given_paths_then_equal_bytes(images, tmp_path, size):
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_json(spec_of(size))))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.backend == "pil"  # There is no torchvision here; see tests/interop.
    encoder = PretrainedEncoder("none", spec_of(size), {}, None)
    for path in images if size == 57 else images[:46]:  # 46 images have each way of writing twice.
        [pixels] = processor([str(path)], do_rescale=False, do_normalize=False)["pixel_values"]
        assert pixels.dtype == np.uint8 and pixels.shape == (3, size, size)
        encoded = open_encoded(path.read_bytes())
        with Image.open(path) as image:
            ours = {
                "path": encoder.pixels(path),
                "image": encoder.pixels(image),
                "array": encoder.pixels(np.asarray(encoded.decode_full())),
                "evaluation": View(size)(encoded),
            }
        for source, our_pixels in ours.items():
            np.testing.assert_array_equal(our_pixels, pixels.transpose(1, 2, 0), f"{path.name} as {source}")
