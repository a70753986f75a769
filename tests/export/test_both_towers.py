"""Models with a text tower: equal to transformers' `Aimv2Model`, and exported again with every bit."""

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aimv2_jax import load_encoder
from aimv2_jax.errors import UserError
from aimv2_jax.export import __main__ as export
from aimv2_jax.export import apple_export, hf_export, verify
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.pretrained.dual_encoder import PretrainedDualEncoder, dual_encoder_of, load_dual_encoder
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_import import read_dual_weights
from aimv2_jax.pretrained.source import in_memory, open_weights
from tests.helpers.tokenizer_files import word_tokenizer

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="extra [test]")

IMAGE = EncoderSpec(width=32, depth=2, heads=2, hidden=48, patch_size=7, image_size=28, position="learned", head=True)
TEXT = TextSpec(vocab_size=60, width=24, depth=2, heads=3, hidden=40, length=11, end_id=50)
SPEC = DualEncoderSpec(IMAGE, TEXT, embed_dim=20)
RELEASED = DualEncoderSpec(
    EncoderSpec(1024, 24, 8, 2816, 14, 224, "learned", head=True), TextSpec(49408, 768, 12, 6, 2048, 77, 49407), 768
)
TOLERANCE = 2e-5  # A fraction of the largest entry, in float32, as in test_golden.py.
END, PAD = TEXT.end_id, 0
# Rows of 11 tokens: a short text, one of full length, one with end tokens as padding, one that is only an end.
TOKENS = np.array(
    [
        [3, 9, 4, END, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        [7, 2, 9, 4, 8, 1, 59, 3, 6, 5, END],
        [5, 1, END, END, END, END, END, END, END, END, END],
        [END, 4, 4, END, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
)


def drawn(spec: DualEncoderSpec):
    """Weights that are noise everywhere, so that no two tensors are equal and every one matters."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape) * (shape[-2] ** -0.5 if path.endswith("kernel") else 0.3)
        offset = {"scale": 1.0, "logit_scale": 2.0, "logit_bias": -9.0}.get(path.rpartition("/")[2], 0.0)
        return np.asarray(noise + offset, np.float32)

    return in_memory("drawn", spec, {path: draw(path, shape) for path, shape in spec.shapes().items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with both towers."""
    path = tmp_path_factory.mktemp("both") / "hf"
    path.mkdir()
    hf_export.write_folder(path, drawn(SPEC), "float32", 10**9)
    return path


@pytest.fixture(scope="module")
def model(folder) -> PretrainedDualEncoder:
    return load_dual_encoder(folder)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=(3, 28, 28, 3), dtype=np.uint8)


def assert_close(ours, theirs, what: str) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max(), what


def assert_equals_transformers(model: PretrainedDualEncoder, theirs, images: np.ndarray, tokens: np.ndarray) -> None:
    """Compares features of both towers, pooled features, embeddings and logits."""
    import torch

    end = model.spec.text.end_id
    first = (tokens == end).argmax(1)
    valid = np.arange(tokens.shape[1]) <= first[:, None]
    mean, std = (np.array(value, np.float32) for value in (model.spec.image.pixel_mean, model.spec.image.pixel_std))
    pixels = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = theirs(
            input_ids=torch.from_numpy(tokens),
            pixel_values=torch.from_numpy(pixels),
            attention_mask=torch.from_numpy(valid.astype(np.int64)),
        )
    text, _ = model.spec.text.tower().apply({"params": model.params["text"]}, jnp.asarray(tokens))
    assert_close(text[valid], out.text_model_output.last_hidden_state.numpy()[valid], "text features")
    assert_close(model.encoder(list(images)), out.vision_model_output.last_hidden_state, "image features")
    assert_close(model.encoder.pooled(list(images)), out.vision_model_output.pooler_output, "pooled images")
    image_embeddings, text_embeddings = model.image_embeddings(list(images)), model.text_embeddings_of_tokens(tokens)
    assert_close(image_embeddings, out.image_embeds, "image embeddings")
    assert_close(text_embeddings, out.text_embeds, "text embeddings")
    logits = model.logit_scale * image_embeddings @ text_embeddings.T
    assert_close(logits, out.logits_per_image, "logits")


@needs_transformers
def test_both_towers_equal_transformers(folder, model, images):
    """Features, embeddings and logits equal transformers', for short, full, padded texts and several ends."""
    import transformers

    theirs, report = transformers.Aimv2Model.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert_equals_transformers(model, theirs.eval(), images, TOKENS)
    short = np.array([[3, 9, 4, END], [END, END, END, END]])
    assert_equals_transformers(model, theirs, images[:1], short)


@needs_transformers
def test_model_saved_by_transformers_is_exported_again(tmp_path, images):
    """A folder that transformers wrote is imported and exported with its config and every bit."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "max_position_embeddings": 11, "eos_token_id": END}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 7}
    config = transformers.Aimv2Config(text_config=text, vision_config=vision, projection_dim=20)
    theirs = transformers.Aimv2Model(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert export.main([f"--import={tmp_path / 'theirs'}", f"--output={tmp_path / 'ours'}"]) == 0
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    theirs.config._attn_implementation = "eager"
    assert_equals_transformers(load_dual_encoder(tmp_path / "ours"), theirs, images, TOKENS)
    written, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    for key in written.keys() - {"text_config", "vision_config"}:
        assert written[key] == saved[key], key
    for tower in ("text_config", "vision_config"):
        assert {key: saved[tower][key] for key in written[tower]} == written[tower]


def assert_same_tensors(expected: Path, actual: Path) -> None:
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (expected, actual))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)


def test_released_model_has_its_parameters():
    """The released shape has 436,680,193 parameters."""
    assert count_parameters(jax.eval_shape(lambda: RELEASED.initial(jax.random.key(0)))) == 436_680_193


def test_apple_names_of_both_towers(folder, images, tmp_path):
    """Both towers are exported under Apple's names, and imported from there with every bit."""
    assert export.main([f"--import={folder}", f"--output={tmp_path / 'apple'}", "--format=apple"]) == 0
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "apple/model.safetensors").items()}
    other = {name: shape for name, shape in shapes.items() if ".blocks." not in name}
    assert other == {
        "image_encoder.preprocessor.patchifier.proj.weight": (32, 3, 7, 7),
        "image_encoder.preprocessor.patchifier.proj.bias": (32,),
        "image_encoder.preprocessor.patchifier.norm.weight": (32,),
        "image_encoder.preprocessor.pos_embed": (1, 16, 32),
        "image_encoder.trunk.post_trunk_norm.weight": (32,),
        "image_encoder.head.cls_token": (1, 1, 32),
        "image_encoder.head.k.weight": (32, 32),
        "image_encoder.head.v.weight": (32, 32),
        "image_encoder.head.linear.weight": (32, 32),
        "image_encoder.head.linear.bias": (32,),
        "image_projector.weight": (20, 32),
        "text_encoder.preprocessor.text_embedding.weight": (60, 24),
        "text_encoder.preprocessor.positional_embedding": (11, 24),
        "text_encoder.trunk.post_trunk_norm.weight": (24,),
        "text_projector.weight": (20, 24),
        "log_logit_scale": (),
    }
    first = "text_encoder.trunk.blocks.0."
    assert {name: shape for name, shape in shapes.items() if name.startswith(first)} == {
        f"{first}norm_1.weight": (24,),
        f"{first}norm_2.weight": (24,),
        f"{first}attn.qkv.weight": (72, 24),
        f"{first}attn.proj.weight": (24, 24),
        f"{first}mlp.fc1.weight": (40, 24),
        f"{first}mlp.fc3.weight": (40, 24),
        f"{first}mlp.fc2.weight": (24, 40),
    }
    assert export.main([f"--import={tmp_path / 'apple'}", f"--output={tmp_path / 'hf'}"]) == 0
    assert_same_tensors(folder, tmp_path / "hf")
    # The encoder alone, from the folder and from a file without config.
    expected = load_encoder(folder)(images)
    np.testing.assert_array_equal(load_encoder(tmp_path / "apple")(images), expected)
    np.testing.assert_array_equal(load_encoder(tmp_path / "apple/model.safetensors", heads=2)(images), expected)


def test_apple_file_without_config(tmp_path):
    """A file alone gives every size if the heads of both towers are 128 wide, and CLIP's end token."""
    image = EncoderSpec(128, 1, 1, 8, 7, 28, "learned", head=True)
    weights = drawn(DualEncoderSpec(image, TextSpec(60, 256, 2, 2, 8, 11, 59), 20))
    apple_export.write_folder(tmp_path, weights, "float32")
    assert read_dual_weights(tmp_path / "model.safetensors").spec == weights.spec


def test_both_towers_in_a_checkpoint(folder, model, images, tmp_path):
    """An export by --format orbax is loaded with the same embeddings; the encoder may be exported alone."""
    run = tmp_path / "orbax"
    assert export.main([f"--import={folder}", f"--output={run}", "--format=orbax"]) == 0
    ours = load_dual_encoder(run)
    np.testing.assert_array_equal(ours.image_embeddings(images), model.image_embeddings(images))
    np.testing.assert_array_equal(ours.text_embeddings_of_tokens(TOKENS), model.text_embeddings_of_tokens(TOKENS))
    assert export.main([f"--checkpoint={run}", f"--output={tmp_path / 'alone'}", "--encoder-only"]) == 0
    assert open_weights(tmp_path / "alone").spec == IMAGE
    np.testing.assert_array_equal(load_encoder(tmp_path / "alone").pooled(images), model.encoder.pooled(images))


def test_bias_of_a_sigmoid_loss_is_kept(tmp_path):
    """The logit bias, which transformers' model lacks, is kept in the config with every bit."""
    weights = drawn(DualEncoderSpec(IMAGE, TEXT, 20, "sigmoid"))
    hf_export.write_folder(tmp_path, weights, "float32", 10**9)
    assert "texts differ by" in verify.check_written(tmp_path, weights, "float32")
    model = load_dual_encoder(tmp_path)
    assert np.float32(model.logit_bias) == weights.read(["logit_bias"])["logit_bias"] and model.logit_bias != -9


def test_embeddings_do_not_depend_on_batches(model, images):
    """Embeddings have length 1 and are the same in batches of any size; no images and texts give none."""
    np.testing.assert_allclose(np.linalg.norm(model.image_embeddings(images), axis=1), 1, rtol=1e-6)
    many = np.tile(TOKENS, (5, 1))
    whole = model.text_embeddings_of_tokens(many)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(model.text_embeddings_of_tokens(many, batch_size=8), whole, rtol=0, atol=1e-6)
    assert model.text_embeddings_of_tokens(TOKENS[:0]).shape == model.image_embeddings([]).shape == (0, 20)
    shorter = np.concatenate([TOKENS[:1, :4], TOKENS[2:3, :4]])
    np.testing.assert_allclose(model.text_embeddings_of_tokens(shorter), whole[[0, 2]], rtol=0, atol=1e-6)


@pytest.fixture
def with_tokenizer(tmp_path) -> Path:
    """A Hugging Face folder with both towers and a tokenizer.json."""
    file, folder = tmp_path / "words.json", tmp_path / "worded"
    file.write_text(json.dumps(word_tokenizer("a photo of cat dog red disc")))
    folder.mkdir()
    weights = drawn(dataclasses.replace(SPEC, text=dataclasses.replace(TEXT, end_id=2)))
    hf_export.write_folder(folder, dataclasses.replace(weights, tokenizer=file), "float32", 10**9)
    return folder


# All three come from transformers' own image loading, which leaves files open.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@needs_transformers
def test_card_of_both_towers_gives_our_logits(with_tokenizer, monkeypatch):
    """The card's lines run in transformers, and their logits and tokens are ours, also of texts that are cut."""
    monkeypatch.chdir(with_tokenizer)
    verify.sample_images()[0].save("image.jpg")
    card = Path("README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code.replace("PATH", "."), names)
    model = load_dual_encoder(with_tokenizer)
    texts = ["a photo of a cat", "a photo of a dog"]
    logits = model.logit_scale * model.image_embeddings(["image.jpg"]) @ model.text_embeddings(texts).T
    assert_close(logits, names["logits"].detach().numpy(), "logits")
    texts = ["red", "a red disc " * 9]
    theirs = names["tokenizer"](texts, padding="max_length", max_length=TEXT.length, truncation=True)["input_ids"]
    ours, _ = model.tokenizer.encode([text.encode() for text in texts])
    for their_row, our_row in zip(theirs, ours.tolist()):
        assert their_row[: their_row.index(2) + 1] == our_row[: our_row.index(2) + 1]


def test_tokenizer_with_another_end_gets_a_sentence(with_tokenizer, tmp_path):
    """A tokenizer whose end token is not the text tower's, and one that is a link elsewhere, are a UserError."""
    config = json.loads((with_tokenizer / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 3
    (with_tokenizer / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another end token than the text tower, 3: 2"):
        load_dual_encoder(with_tokenizer)
    (with_tokenizer / "tokenizer.json").rename(tmp_path / "outside.json")
    (with_tokenizer / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(UserError, match="leads out of it"):
        load_dual_encoder(with_tokenizer)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (np.full((1, 12), END), "more tokens than the text tower has positions: 12"),
        (np.array([[END, 60]]), "not in the vocabulary of 60: 60"),
        (np.array([[1, END], [1, 2]]), r"1 texts have no end token 50, such as that of row: 1"),
    ],
)
def test_unusable_tokens_get_a_sentence(model, tokens, sentence):
    """Rows that are too long, outside the vocabulary or without an end are a UserError."""
    with pytest.raises(UserError, match=sentence):
        model.text_embeddings_of_tokens(tokens)


def test_model_without_tokenizer_gets_a_sentence(model):
    """Texts for a model without a tokenizer, and a single text, are a UserError."""
    with pytest.raises(UserError, match="the model has no tokenizer"):
        model.text_embeddings(["a cat"])
    with pytest.raises(UserError, match="a single text in place of a list"):
        model.text_embeddings("a cat")


@pytest.mark.parametrize(
    ("tower", "changes", "sentence"),
    [
        (None, {"max_logit_scale": 50.0}, "another max_logit_scale: 50"),
        (None, {"projection_dim": 512}, "visual_projection.weight with another shape"),
        (None, {"aimv2_jax": {"logit_bias": "x"}}, "unusable aimv2_jax"),
        (None, {"text_config": 3}, "no usable text_config"),
        ("text_config", {"eos_token_id": 60}, "the end token is not in the vocabulary of 60: 60"),
        ("text_config", {"eos_token_id": [1, 2]}, "eos_token_id is not a whole number"),
        ("text_config", {"num_attention_heads": 5}, "not a multiple of its heads"),
        ("text_config", {"hidden_act": "gelu"}, "another hidden_act"),
        ("text_config", {"num_hidden_layers": 4000}, r"lacks a tensor: 'text_model\.encoder\.layers\.2\."),
    ],
)
def test_config_of_both_towers_gets_a_sentence(folder, tmp_path, tower, changes, sentence):
    """A value of the config that does not fit is named in a UserError."""
    copy(folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if tower is None else config[tower]).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        read_dual_weights(tmp_path)


def test_head_that_the_config_does_not_mention(folder, tmp_path):
    """The pooled head of both towers is read by its tensors, also if the config says that there is none."""
    copy(folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_dual_weights(tmp_path).spec == SPEC


def copy(folder: Path, to: Path) -> None:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


def test_model_without_both_towers_gets_a_sentence(folder, tmp_path, capsys):
    """An encoder alone, and an image encoder without a pooled head, are a UserError."""
    assert export.main([f"--import={folder}", f"--output={tmp_path / 'alone'}", "--encoder-only"]) == 0
    assert "ignored: " in capsys.readouterr().out
    with pytest.raises(UserError, match="the model has no text tower"):
        load_dual_encoder(tmp_path / "alone")
    copy(folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    without = {name: tensor for name, tensor in tensors.items() if ".head." not in name}
    save_file(without, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no pooled head"):
        load_dual_encoder(tmp_path)


@pytest.mark.slow
@needs_transformers
def test_released_shape_equals_transformers(tmp_path):
    """At the released shape features, embeddings and logits equal transformers'."""
    import transformers

    weights = drawn(RELEASED)
    hf_export.write_folder(tmp_path, weights, "float32", 10**10)
    theirs = transformers.Aimv2Model.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 436_680_193
    rng, end = np.random.default_rng(2), RELEASED.text.end_id
    tokens = rng.integers(end, size=(3, 77))
    tokens[0, 5:], tokens[1, -1], tokens[2, 40:] = end, end, end
    images = rng.integers(256, size=(2, 224, 224, 3), dtype=np.uint8)
    assert_equals_transformers(dual_encoder_of(weights), theirs, images, tokens)
