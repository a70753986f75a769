"""Exports under Apple's names: tensors as in the released files, and a folder that timm and the import read."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from aimv2_jax import load_encoder
from aimv2_jax.export import __main__ as export
from aimv2_jax.export.timm_config import timm_fields
from aimv2_jax.pretrained import param_names
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from tests.helpers.trained_run import disc_image

LARGE = EncoderSpec(1024, 24, 8, 2816, 14, 224, "learned")
RELEASED = Path(__file__).parent / "aimv2_large_patch14_224.txt"
"""Name, dtype and shape of every tensor of Apple's aimv2-large-patch14-224, as ml-aim's modules have them."""
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def released() -> dict[str, tuple[int, ...]]:
    lines = [line.split() for line in RELEASED.read_text().splitlines()]
    assert {dtype for _, dtype, *_ in lines} == {"F32"}
    return {name: tuple(map(int, shape)) for name, _, *shape in lines}


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("apple") / "exported"
    assert export.main([f"--checkpoint={workdir}", f"--output={folder}", "--format=apple"]) == 0
    return folder


def test_apple_names_of_large_are_the_released():
    """An export of L at 224 pixels has the names and shapes of Apple's released file."""
    assert param_names.expected("apple", LARGE.shapes()) == released()


def test_apple_export_has_released_names_and_dtype(exported):
    """The file of a small model has the released names of its blocks, their dtype and rank, and nothing else."""
    ranks = {
        name: len(shape) for name, shape in released().items() if "blocks" not in name or int(name.split(".")[2]) < 2
    }
    with safe_open(exported / "model.safetensors", "np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: len(tensor.get_shape()) for name, tensor in tensors.items()} == ranks
        assert {tensor.get_dtype() for tensor in tensors.values()} == {"F32"}
        assert tensors["trunk.blocks.1.attn.qkv.weight"].get_shape() == [96, 32]
        assert tensors["preprocessor.pos_embed"].get_shape() == [1, 16, 32]


def test_apple_export_is_read_back(exported, workdir):
    """The folder has the run's features for our import, and sizes and pixel statistics in its config."""
    images = [disc_image(number)[0] for number in range(2)]
    np.testing.assert_array_equal(load_encoder(exported)(images), load_encoder(workdir)(images))
    config = json.loads((exported / "config.json").read_text())
    # Apple's tensors fit no class of transformers, which would draw random ones.
    assert "architectures" not in config and "model_type" not in config
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert "local-dir:" in (exported / "README.md").read_text()


def test_timm_config_names_the_released_models():
    """Released sizes get timm's name of them, other sizes its arguments, and what timm lacks gets nothing."""
    sizes = {"large": (1024, 8, 2816), "huge": (1536, 12, 4096), "1b": (2048, 16, 5632), "3b": (3072, 24, 8192)}
    for name, (width, heads, hidden) in sizes.items():
        for side in (224, 336, 448):
            fields = timm_fields(EncoderSpec(width, 24, heads, hidden, 14, side, "learned"))
            assert fields["architecture"] == f"aimv2_{name}_patch14_{side}" and "model_args" not in fields
    for width, hidden in ((768, 2048), (384, 1024), (96, 257)):
        arguments = timm_fields(EncoderSpec(width, 2, 2, hidden, 8, 32, "learned"))["model_args"]
        assert int(width * arguments["mlp_ratio"]) == hidden and arguments["embed_dim"] == width
    for change in ({"position": "sincos"}, {"head": True}, {"norm_eps": 1e-6}):
        assert timm_fields(EncoderSpec(**{**LARGE.as_json(), **change})) == {}


def test_import_prints_the_pixel_statistics(exported, tmp_path, capsys):
    """An import prints mean and standard deviation of the pixels, and whether a file gave them."""
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((exported / name).read_bytes())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(processor | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD})
    )
    assert export.main([f"--import={folder}", f"--output={tmp_path / 'hf'}", "--dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert f"mean (0.4815, 0.4578, 0.4082), standard deviation (0.2686, 0.2613, 0.2758), from {folder}" in printed
    written = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (written["image_mean"], written["image_std"]) == (CLIP_MEAN, CLIP_STD)
    file = folder / "model.safetensors"
    assert export.main([f"--import={file}", "--heads=2", f"--output={tmp_path / 'apple'}", "--format=apple"]) == 0
    assert "mean (0.485, 0.456, 0.406), standard deviation (0.229, 0.224, 0.225), assumed" in capsys.readouterr().out
