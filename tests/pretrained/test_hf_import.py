"""Import of Hugging Face's and Apple's encoders; each error is one sentence that names the tensor or the value."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aimv2_jax.errors import UserError
from aimv2_jax.export.hf_export import write_folder
from aimv2_jax.pretrained import param_names
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_import import is_foreign, read_weights
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.safetensors_io import Tensors

SPEC = EncoderSpec(width=16, depth=3, heads=2, hidden=24, patch_size=4, image_size=16, position="learned")
GATE = "encoder.layers.2.ffn.gate_proj.weight"


@functools.cache
def drawn(spec: EncoderSpec) -> LazyWeights:
    """Random parameters, so that no two tensors are equal."""
    rng, shapes = np.random.default_rng(0), spec.shapes()
    arrays = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return LazyWeights("fresh", spec, shapes, lambda paths: {path: arrays[path] for path in paths})


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_folder(path, drawn(SPEC), "float32", max_file_bytes=10**9)
    return path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(read: LazyWeights, expected: LazyWeights) -> None:
    ours, theirs = read.read(), expected.read()
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path, strict=True)


@pytest.mark.parametrize("names", [param_names.NAMES, param_names.DUAL_NAMES], ids=["encoder", "both"])
def test_param_names_are_unique(names):
    """Each parameter name is listed exactly once on either side, and every tensor of the model has a name."""
    for naming in ("hf", "apple"):
        alone = [name.name_in(naming) for name in names if name.part in (None, 0)]
        assert len(set(alone)) == len(alone)
    trunks = ["encoder/trunk"] if names is param_names.NAMES else ["encoder/trunk", "text/trunk"]
    fused = [name.ours for name in names if name.part is not None]
    kinds = ("query", "key", "value")
    assert fused == [f"{trunk}/blocks/attention/{kind}/kernel" for trunk in trunks for kind in kinds]
    assert [name.part for name in names if name.part is not None] == [0, 1, 2] * len(trunks)
    image = EncoderSpec(16, 3, 2, 24, 4, 16, "learned", head=True)
    full = image if names is param_names.NAMES else DualEncoderSpec(image, TextSpec(9, 8, 1, 2, 8, 5, 8), 4)
    ours = [name.ours for name in names]
    assert len(set(ours)) == len(ours) and set(full.shapes()) == set(ours)


@pytest.mark.parametrize("change", [{}, {"position": "sincos", "area": 16}, {"head": True}])
def test_encoder_when_written_and_read_then_sizes_and_every_bit_are_back(tmp_path, change):
    spec = EncoderSpec(**{**SPEC.as_json(), **change})
    weights = drawn(spec)
    write_folder(tmp_path, weights, "float32", max_file_bytes=10**9)
    read = read_weights(tmp_path)
    assert read.spec == spec and read.ignored == ()
    assert_equal(read, weights)


def test_write_encoder_in_several_files(tmp_path):
    """An encoder whose files are bounded is written as several with an index and the same tensors."""
    weights = drawn(SPEC)
    write_folder(tmp_path, weights, "float32", max_file_bytes=4000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    # A file exceeds the limit only if it has a single tensor.
    assert all(len(load_file(tmp_path / file)) == 1 or (tmp_path / file).stat().st_size < 4000 + 2000 for file in files)
    assert_equal(read_weights(tmp_path), weights)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=re.escape(files[1])):
        read_weights(tmp_path)


def test_read_encoder_of_model_with_text(folder):
    """An encoder that is part of a model with text is read, and the other tensors are reported."""
    text = {
        "text_model.rms_norm.weight": np.ones(3),
        "logit_scale": np.ones(()),
        "visual_projection.weight": np.ones((2, 2)),
    }
    rewrite(folder, lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()} | text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "aimv2", "vision_config": config}))
    read = read_weights(folder)
    assert sorted(read.ignored) == sorted(text)
    assert_equal(read, drawn(SPEC))


def test_file_by_itself_when_read_then_sizes_are_those_of_its_tensors(folder):
    file = folder / "model.safetensors"
    assert read_weights(file, heads=2).spec == SPEC
    with pytest.raises(UserError, match=r"the number of attention heads.*16 wide.*--heads"):
        read_weights(file)


def test_paths_when_asked_whether_they_are_foreign_then_runs_are_not(folder, tmp_path):
    assert is_foreign(folder) and is_foreign(folder / "model.safetensors")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    assert not is_foreign(tmp_path / "run") and not is_foreign(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {n: x for n, x in t.items() if n != GATE}, f"lacks a tensor: '{GATE}'"),
        (lambda t: t | {"lora.weight": np.ones(2)}, "tensor that AIMv2's encoder lacks: 'lora.weight'"),
        (lambda t: t | {GATE: t[GATE][1:]}, rf"{GATE} with another shape: '\(23, 16\), expected \(24, 16\)'"),
        (lambda t: t | {GATE: t[GATE].astype(np.int32)}, f"{GATE} of an unsupported dtype: 'I32'"),
        (lambda t: {"embeddings.token_embedding.weight": np.ones((4, 2))}, "a text model"),
        (lambda t: {"conv1.weight": np.ones((4, 2))}, "not an AIMv2 vision encoder.*conv1.weight"),
        (lambda t: {f"encoder.{n}": x for n, x in t.items()}, "not an AIMv2 vision encoder"),
    ],
)
def test_tensors_when_they_do_not_fit_then_one_sentence_names_the_one(folder, change, sentence):
    rewrite(folder, change)
    with pytest.raises(UserError, match=sentence):
        read_weights(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 4}, r"lacks a tensor: 'encoder\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"lacks: 'encoder\.layers\.2\."),
        ({"image_size": 18}, "not a multiple of the patch size: '18, patches of 4'"),
        ({"image_size": 20}, r"position_embedding.weight with another shape"),
        ({"is_native": True}, "lacks: 'embeddings.position_embedding.weight'"),
        ({"use_head": True}, "lacks a tensor: 'head.cls_token'"),
        ({"num_attention_heads": 3}, "not a multiple of the heads: '16, 3'"),
        ({"hidden_size": "16"}, "hidden_size is not a whole number above zero.*: '16'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is not a whole number.*up to 4,096: 1000000000"),
        ({"num_hidden_layers": 4000}, r"lacks a tensor: 'encoder\.layers\.3\."),
        ({"hidden_size": 10**30}, "hidden_size is not a whole number"),
        ({"intermediate_size": 10**30}, "intermediate_size is not a whole number"),
        ({"image_size": 14 * 10**9}, "image_size is not a whole number"),
        ({"image_size": [[1], [1]]}, r"image_size is not a whole number.*: \[1\]"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is not a number above zero"),
        ({"aimv2_jax": {"area": -5}}, "unusable aimv2_jax"),
        ({"aimv2_jax": {"area": 10**30}}, "unusable aimv2_jax"),
        ({"aimv2_jax": 3}, "unusable aimv2_jax"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is not a number above zero: '1e-5'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is not a number above zero: None"),
        ({"hidden_act": "gelu"}, "another hidden_act: 'gelu'"),
        ({"vision_config": 3}, "no usable vision_config"),
        ({"model_type": "aimv2_text_model"}, "a text model"),
    ],
)
def test_config_when_it_does_not_fit_then_one_sentence_names_the_value(folder, changes, sentence):
    reconfigure(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        read_weights(folder)


def test_files_when_missing_or_damaged_then_one_sentence_names_them(folder, tmp_path):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:100], whole[:-10], b"\xff" * 8 + whole[8:], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"not a complete safetensors file: '.*model\.safetensors'"):
            read_weights(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"not a config .*: '.*config\.json'"):
        read_weights(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config is missing: '.*config\.json'.*--heads"):
        read_weights(folder)
    file.unlink()
    with pytest.raises(UserError, match="no such safetensors file"):
        read_weights(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such safetensors file"):
        Tensors(folder)


def test_processor_config_numbers(folder):
    """Whole numbers in the processor's config are accepted; other values are a UserError."""
    path = folder / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    path.write_text(json.dumps(processor | {"image_std": [1, 1, 1]}))
    assert read_weights(folder).spec.pixel_std == (1.0, 1.0, 1.0)
    wrong = {
        "image_mean": ([0.5, "x", 0.5], [0.5, 0.5], 3, [0.5, 0.5, 10**400]),
        "image_std": ([0, 0, 0], [0.2, 0.2, -1], [True, 1, 1]),
    }
    for key, values in wrong.items():
        for value in values:
            path.write_text(json.dumps(processor | {key: value}))
            with pytest.raises(UserError, match=f"{key} is not three numbers"):
                read_weights(folder)
    for text in ("[" * 100_000, '{"image_mean": NaN}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="not a config"):
            read_weights(folder)


def test_encoder_of_numbers_that_are_not_finite_is_refused(folder):
    rewrite(folder, lambda t: t | {GATE: np.full_like(t[GATE], np.nan)})
    with pytest.raises(UserError, match=f"not all finite: '{GATE}'"):
        read_weights(folder).read()


def test_encoder_does_not_take_files_outside_its_folder(folder, tmp_path):
    """An index or link of an untrusted model could name any file of this machine."""
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    (folder / "model.safetensors").unlink()
    tensors = load_file(outside)
    for name in ("../outside.safetensors", str(outside), "a/../../outside.safetensors", "", "..", "x" * 5000, "a\0"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises(UserError, match="lists a name that is not a file in its own folder"):
            read_weights(folder)
    (folder / "link.safetensors").symlink_to(outside)
    index = {"weight_map": dict.fromkeys(tensors, "link.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"leads out of it: '.*link\.safetensors'"):
        read_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "link.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"leads out of it: '.*model\.safetensors'"):
        read_weights(folder)


def test_encoder_in_a_hub_cache_is_read_through_its_links(folder, tmp_path):
    """huggingface_hub stores files in models--X/blobs, and links to them in models--X/snapshots/COMMIT."""
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    assert_equal(read_weights(snapshot), drawn(SPEC))


def test_files_of_an_export_have_the_modes_that_the_umask_gives(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o644}, modes


def test_heads_error_if_known_from_folder(folder):
    """A number of heads given where it is known is a UserError."""
    with pytest.raises(UserError, match=r"heads are given for a folder.*2\. Leave it out"):
        read_weights(folder, heads=2)


def test_index_error_missing_tensor(tmp_path):
    """An index that names a file without the tensor is a UserError."""
    write_folder(tmp_path, drawn(SPEC), "float32", max_file_bytes=4000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["other.weight"] = index["weight_map"][GATE]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks a tensor that .* lists: 'other\.weight'"):
        read_weights(tmp_path)
    for text in ("[]", '{"weight_map": 3}', "{}", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="not an index"):
            read_weights(tmp_path)
