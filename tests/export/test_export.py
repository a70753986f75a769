"""The export command: its folders load in aimv2_jax, and its verification finds differences."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from aimv2_jax import load_encoder, load_model
from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.errors import UserError
from aimv2_jax.export import __main__ as hf
from aimv2_jax.export import hf_export, verify
from aimv2_jax.pretrained.encoder import encoder_of
from aimv2_jax.pretrained.hf_import import read_weights
from aimv2_jax.pretrained.model import load
from aimv2_jax.pretrained.source import has_both_towers, open_weights
from aimv2_jax.train.builder import build_setup
from tests.helpers.tokenizer_files import word_tokenizer
from tests.helpers.trained_run import disc_image, random_state


@pytest.fixture(scope="module")
def images():
    return [disc_image(number)[0] for number in range(3)]


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert hf.main([f"--checkpoint={workdir}:40", f"--output={folder}"]) == 0
    return folder


def test_export_read_back(exported, workdir, images, config):
    """An export that is read back gives the same features, and its card describes the run."""
    np.testing.assert_array_equal(load_encoder(exported)(images), load_encoder(f"{workdir}:40")(images))
    card = (exported / "README.md").read_text()
    assert "40 of" in card and "| train | synthetic | 66.7% |" in card and "| eval_loss |" in card
    assert f"data.image_size = {config.data.image_size}" in card
    assert str(workdir) not in card
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 32} and processor["resample"] == 3


def test_export_when_asked_for_bfloat16_then_rounded_once_and_said_so(workdir, tmp_path, capsys):
    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/hf", "--dtype=bfloat16"]) == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
    whole, rounded = open_weights(workdir).read(), read_weights(tmp_path / "hf").read()
    for path, tensor in whole.items():
        np.testing.assert_allclose(rounded[path], tensor, rtol=2**-8, atol=0, err_msg=path)
    with safe_open(tmp_path / "hf/model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_export_when_asked_for_small_files_then_several(workdir, tmp_path):
    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/hf", "--max-file-size=20KB"]) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3


def test_export_of_the_encoder_as_a_checkpoint_when_loaded_then_the_same(workdir, tmp_path, images, capsys):
    assert hf.main([f"--checkpoint={workdir}", f"--output={tmp_path}/encoder", "--format=orbax"]) == 0
    np.testing.assert_array_equal(load_encoder(tmp_path / "encoder")(images), load_encoder(workdir)(images))
    assert hf.main([f"--checkpoint={tmp_path}/encoder", f"--output={tmp_path}/whole", "--whole"]) == 2
    assert "an encoder alone" in capsys.readouterr().err


def test_whole_export_loaded(workdir, tmp_path, config):
    """A whole export is loaded with all parameters, the config and its own tokenizer."""
    assert hf.main([f"--checkpoint={workdir}:40", f"--output={tmp_path}/whole", "--whole"]) == 0
    model, run = load_model(f"{tmp_path}/whole"), load(f"{workdir}:40")
    jax.tree.map(np.testing.assert_array_equal, model.params, run.params)
    assert model.step == 40 and model.config.tokenizer.path == f"{tmp_path}/whole/tokenizer.model"
    tokens, _ = model.tokenizer().encode([b"a red disc"])
    np.testing.assert_array_equal(tokens, run.tokenizer().encode([b"a red disc"])[0])


def test_whole_export_with_a_tokenizer_json(workdir, tmp_path):
    """A whole export keeps a tokenizer.json under that name, and is loaded with it."""
    run, exported = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(workdir, run)
    content = json.dumps(word_tokenizer())
    (run / "tokenizer.json").write_text(content)
    assert hf.main([f"--checkpoint={run}:40", f"--output={exported}", "--whole"]) == 0
    assert [path.name for path in exported.glob("tokenizer*")] == ["tokenizer.json"]
    assert (exported / "tokenizer.json").read_text() == content
    model = load_model(exported)
    assert model.config.tokenizer.path == f"{exported}/tokenizer.json"
    assert model.tokenizer().encode([b"red disc"])[0][0, :3].tolist() == [7, 9, model.tokenizer().eos_id]


def test_whole_export_of_another_model(workdir, tmp_path):
    """The check of a whole export fails if its folder has another model."""
    assert hf.main([f"--checkpoint={workdir}:40", f"--output={tmp_path}/whole", "--whole"]) == 0
    assert "and the tokenizer are equal" in verify.check_model(tmp_path / "whole", f"{workdir}:40", "average")
    with pytest.raises(RuntimeError, match="other values than were written"):
        verify.check_model(tmp_path / "whole", f"{workdir}:20", "average")


def test_native_export_area(workdir, tmp_path, images):
    """A native export preserves an area that is not that of the square."""
    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=20, upscale=False)
    weights = dataclasses.replace(weights, spec=spec, shapes=spec.shapes())
    hf_export.write_folder(tmp_path, weights, "float32", 10**9)
    assert "equal bit for bit" in verify.check_written(tmp_path, weights, "float32")
    for ours, theirs in zip(load_encoder(tmp_path)(images), encoder_of(weights)(images)):
        np.testing.assert_array_equal(ours, theirs)


def test_export_value_too_large_for_dtype(workdir, tmp_path):
    """A value that is too large for the dtype of the export raises UserError."""
    weights = open_weights(workdir)
    arrays = {name: leaf * (1e8 if name == "encoder/position" else 1) for name, leaf in weights.read().items()}
    weights = dataclasses.replace(weights, read_paths=lambda paths: {name: arrays[name] for name in paths})
    with np.errstate(over="ignore"):
        hf_export.write_folder(tmp_path, weights, "float16", 10**9)
        with pytest.raises(UserError, match=r"encoder/position has values that are not finite.*float16"):
            verify.check_written(tmp_path, weights, "float16")


def test_import_when_exported_again_then_the_same_bit_for_bit(exported, tmp_path, images):
    file = exported / "model.safetensors"
    assert hf.main([f"--import={file}", "--heads=2", f"--output={tmp_path}/orbax", "--format=orbax"]) == 0
    assert hf.main([f"--checkpoint={tmp_path}/orbax", f"--output={tmp_path}/hf"]) == 0
    assert (tmp_path / "hf/model.safetensors").read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(load_encoder(tmp_path / "orbax")(images), load_encoder(exported)(images))


def test_check_when_what_was_written_differs_then_it_fails(workdir, tmp_path):
    weights = open_weights(workdir)
    hf_export.write_folder(tmp_path, weights, "float32", 10**9)
    assert "equal bit for bit" in verify.check_written(tmp_path, weights, "float32")
    with pytest.raises(RuntimeError, match="other values than were written"):
        verify.check_written(tmp_path, open_weights(f"{workdir}:40"), "float32")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint={run}", "--output={full}"], "--output is not empty"),
        (["--checkpoint={run}", "--output={file}"], "--output is a file"),
        (["--checkpoint={run}", "--import={run}", "--output={new}"], "not allowed with"),
        (["--output={new}"], "required"),
        (["--import={full}", "--output={new}", "--whole"], "--whole is for --checkpoint"),
        (["--checkpoint={run}", "--output={new}", "--whole", "--dtype=bfloat16"], "--dtype is for --format hf"),
        (["--checkpoint={run}", "--output={new}", "--heads=2"], "--heads is for --import"),
        (["--checkpoint={run}", "--output={new}", "--max-file-size=5XB"], "'5XB' is not a size"),
        (["--import={run}/none", "--output={new}"], "no such safetensors file|no such folder"),
    ],
)
def test_command_line_when_it_cannot_work_then_one_line(workdir, tmp_path, capsys, arguments, sentence):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    paths = {"run": workdir, **{name: tmp_path / name for name in ("full", "file", "new")}}
    try:
        code = hf.main([argument.format(**paths) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr().err
    assert code == 2 and re.search(sentence, captured) and len(captured.strip().splitlines()) == 1
    assert (tmp_path / "full/precious").read_text() == "mine" and not (tmp_path / "new").exists()


def test_encoder_of_a_lit_run_is_exported_alone(config, tmp_path, images):
    """By --encoder-only an export of a LiT run has no text tower, and is taken for an encoder from then on."""
    init = dataclasses.replace(config.init, reinit=("encoder",))
    text = dataclasses.replace(config.lit.text, width=16, depth=1, heads=2, vocab_size=1024, text_length=20)
    lit = dataclasses.replace(config, task="lit", init=init, lit=dataclasses.replace(config.lit, text=text))
    with Checkpointer(tmp_path / "run", keep=1) as checkpointer:
        checkpointer.save(1, random_state(build_setup(lit, jax.devices()[:1])), lit)
    source, alone, again = str(tmp_path / "run"), str(tmp_path / "alone"), str(tmp_path / "again")
    assert has_both_towers(source)
    assert hf.main([f"--checkpoint={source}", f"--output={alone}", "--format=orbax", "--encoder-only"]) == 0
    assert not has_both_towers(alone)
    assert hf.main([f"--checkpoint={alone}", f"--output={again}"]) == 0
    np.testing.assert_array_equal(load_encoder(again)(images), load_encoder(source)(images))
