"""Hand-offs: LLaVA in transformers gets the features of the encoder; the page runs for CLIP_benchmark."""

import json
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from aimv2_jax import load_encoder
from aimv2_jax.export.hf_export import write_folder
from aimv2_jax.export.verify import sample_images
from aimv2_jax.pretrained.dual_encoder import load_dual_encoder
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.source import in_memory
from experiments.handoff import llava
from tests.helpers.tiny import ROOT
from tests.helpers.tokenizer_files import SPECIAL, word_tokenizer

sys.modules.setdefault("triton", None)  # See tests/export/conftest.py.
pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="extra [test]"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # transformers leaves files open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Largest difference of float32 features in units of the largest entry, as in test_golden.py.
TOLERANCE = 2e-5


SPEC = EncoderSpec(width=32, depth=2, heads=2, hidden=48, patch_size=8, image_size=32, position="learned")
IMAGE = EncoderSpec(width=32, depth=2, heads=2, hidden=48, patch_size=7, image_size=28, position="learned", head=True)
TEXT = TextSpec(vocab_size=12, width=24, depth=2, heads=3, hidden=40, length=8, end_id=SPECIAL["</s>"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An exported encoder of 16 patches, in which every weight is noise."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("encoder")
    arrays = {
        path: (rng.normal(size=shape) * (0.2 if path.endswith("kernel") else 0.3) + path.endswith("scale")).astype("f4")
        for path, shape in SPEC.shapes().items()
    }
    write_folder(folder, in_memory("noise", SPEC, arrays), "float32", 10**9)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A random language model of two blocks, with a tokenizer of ten words."""
    transformers = llava.import_transformers()
    folder = tmp_path_factory.mktemp("language")
    settings = dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model_config = transformers.LlamaConfig(**settings, num_attention_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(model_config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(word_tokenizer()))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def built(encoder, language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "llava"
    flags = [f"--encoder={encoder}", f"--language-model={language_model}", f"--output={folder}"]
    assert llava.main([*flags, "--crop"]) == 0
    return folder


def reloaded(folder):
    transformers = llava.import_transformers()
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


def features_in(model, processor, images):
    """What the connector gets in a forward pass of the whole model, by images."""
    import torch

    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        for image in images:
            model(**processor(text="<image> red", images=image, return_tensors="pt"))
    hook.remove()
    return np.concatenate(seen)


def test_llava_features_equal_those_of_load_encoder(built, encoder):
    """After saving and reloading, the connector gets every patch's feature after the final norm."""
    model, processor = reloaded(built)
    images = sample_images()
    expected = load_encoder(encoder)(images)
    theirs = features_in(model, processor, images)
    assert theirs.shape == expected.shape == (4, 16, 32)
    assert np.abs(theirs - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert model.config.vision_feature_select_strategy == processor.vision_feature_select_strategy == "full"


def test_llava_defaults_drop_a_patch_and_the_norm(built, encoder):
    """What the hand-off sets matters: by transformers' defaults a patch, the last block or the norm is missing."""
    model, processor = reloaded(built)
    [image] = sample_images(1)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    ours = load_encoder(encoder)
    batch, _ = ours.batch([ours.pixels(image)], 1)
    after_norm, residual = (np.asarray(ours.features(**batch, layer=layer))[0] for layer in (None, ours.spec.depth))
    assert np.abs(after_norm - residual).max() > 0.1 * np.abs(after_norm).max()
    model.model.vision_tower.config.tie_last_hidden_states = None  # transformers' own choice.
    without_norm = llava.image_features(model, pixels)
    assert np.abs(without_norm - residual).max() <= TOLERANCE * np.abs(residual).max()
    model.config.vision_feature_select_strategy = "default"
    np.testing.assert_array_equal(llava.image_features(model, pixels), without_norm[1:])
    defaults = llava.import_transformers().LlavaConfig()
    assert (defaults.vision_feature_layer, defaults.vision_feature_select_strategy) == (-2, "default")


def test_llava_of_a_block_generates(encoder, language_model, tmp_path, capsys):
    """With --layer the features are those after that block; images are padded to squares; text is generated."""
    folder = tmp_path / "llava"
    arguments = [f"--encoder={encoder}", f"--language-model={language_model}", f"--output={folder}"]
    assert llava.main([*arguments, "--layer=1"]) == 0
    assert "all 16 patches after block 1 of 2, before the norm" in capsys.readouterr().out
    model, processor = reloaded(folder)
    [image] = sample_images(1)
    assert image.width != image.height and processor.image_processor.do_pad
    ours = load_encoder(encoder)
    square = llava.padded_to_square(image, ours.spec.pixel_mean)
    batch, _ = ours.batch([ours.pixels(square)], 1)
    expected = np.asarray(ours.features(**batch, layer=1))[:1]
    theirs = features_in(model, processor, [image])
    assert np.abs(theirs - expected).max() <= TOLERANCE * np.abs(expected).max()
    inputs = processor(text="<image> red disc", images=image, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--encoder={new}"], "--encoder is not an exported encoder"),
        (["--layer=3"], "--layer is out of range: 3. Give 0 to 2"),
        (["--image-size=64"], "does not resize learned positions: 64"),
        (["--output={encoder}"], "--output is not empty"),
        (["--language-model={new}"], "--language-model: transformers cannot load it"),
    ],
)
def test_llava_user_errors(encoder, language_model, tmp_path, capsys, arguments, sentence):
    """A command that cannot work ends with one line and code 2."""
    paths = {"encoder": encoder, "new": tmp_path / "new"}
    first = [f"--encoder={encoder}", f"--language-model={language_model}", f"--output={tmp_path / 'out'}"]
    assert llava.main([*first, *(argument.format(**paths) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_page_gives_clip_benchmark_our_embeddings(tmp_path):
    """What CLIP_benchmark calls returns the embeddings of `load_dual_encoder`, up to their length."""
    spec, rng = DualEncoderSpec(IMAGE, TEXT, embed_dim=20), np.random.default_rng(0)
    arrays = {
        path: (0.3 * rng.normal(size=shape) + path.endswith("scale")).astype(np.float32)
        for path, shape in spec.shapes().items()
    }
    write_folder(tmp_path, in_memory("noise", spec, arrays), "float32", 10**9)
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_tokenizer()))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    page = (ROOT / "docs/handoff.md").read_text()
    [code] = re.findall(r"```python\n(import functools\n.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code.replace("PATH", str(tmp_path)), names)
    import torch

    images = [Image.fromarray(rng.integers(256, size=(28, 28, 3), dtype=np.uint8)) for _ in range(2)]
    texts, ours = ["red disc", "a b c"], load_dual_encoder(tmp_path)
    with torch.no_grad():
        image = names["model"].encode_image(torch.stack([torch.as_tensor(names["transform"](i)) for i in images]))
        text = names["model"].encode_text(names["tokenizer"](texts).to("cpu"))
    for theirs, expected in ((image, ours.image_embeddings(images)), (text, ours.text_embeddings(texts))):
        theirs = theirs.numpy() / np.linalg.norm(theirs.numpy(), axis=1, keepdims=True)
        np.testing.assert_allclose(theirs, expected, rtol=0, atol=2e-5)  # Float32 sums are in another order.
