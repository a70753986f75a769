"""Distillation through `aimv2_jax.main`: the teacher's file, the student as a model, refused teachers.

Resume and evaluation: test_tasks.py.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.data.tokenizer import load_tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.export.__main__ import main as export
from aimv2_jax.main import main
from aimv2_jax.pretrained.encoder import load_encoder
from aimv2_jax.pretrained.model import Resolution, load
from aimv2_jax.pretrained.teacher import open_teacher
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.init_from import RunWeights, check_teacher, read_teacher, warm_start
from tests.helpers.golden_names import paths
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.tiny import TASKS, tiny_arguments, tiny_config
from tests.helpers.trained_run import random_state, save_model

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

# The teacher has the sizes of the tiny run (tests/helpers/tiny.py), and the student is half as wide.
SIZES = {f"distill__encoder__{key}": n for key, n in dict(width=32, depth=2, heads=2, hidden=64).items()}
SIZES |= {f"distill__decoder__{key}": n for key, n in dict(width=16, depth=2, heads=2, hidden=32).items()}
SIZES |= {"model__encoder__width": 16, "model__encoder__hidden": 32}
STEPS = 4


def settings(teacher: Path, **changes) -> dict[str, object]:
    defaults = dict(distill__path=teacher, distill__temperature=1.0, train__steps=STEPS, train__save_every=0)
    return TASKS["distill"] | SIZES | defaults | changes


@pytest.fixture(scope="module")
def tokenizer() -> str:
    """The digest of the tiny run's tokenizer, as runs store it."""
    return load_tokenizer(tiny_config()).digest[:16]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher"), tokenizer)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher) -> Path:
    """The teacher's encoder for Hugging Face."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert export([f"--checkpoint={teacher}", f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher) -> Path:
    """A distillation of a few steps, evaluated at the end."""
    workdir = tmp_path_factory.mktemp("distilled")
    assert main(tiny_arguments(workdir, **settings(teacher, train__log_every=1))) == 0
    return workdir


def saved(workdir: Path, step: int, **changes):
    setup = build_setup(tiny_config(**settings(Path("gone"), **changes)))
    return jax.device_get(CheckpointReader(workdir).restore(step, setup.abstract_state))


def test_teacher_is_that_of_the_file_after_any_step(run, teacher):
    """Its bytes are saved unchanged, without moments; the student has moved."""
    config = tiny_config()
    params = build_setup(config).abstract_state.params
    expected = paths(jax.device_get(CheckpointReader(teacher).restore_part(1, {"params": params})["params"]))
    state = saved(run, STEPS)
    actual = paths(state.frozen["teacher"])
    assert actual.keys() == expected.keys()
    for name, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[name], name)
    assert not any("teacher" in name for name in CheckpointReader(run).meta(STEPS)["leaves"] if "frozen/" not in name)
    assert all(leaf.any() for leaf in jax.tree.leaves(state.opt_state[1].mu))


def test_student_starts_from_another_model(teacher, tokenizer, tmp_path, capsys):
    """`init.path` initialises the student, and `distill.path` the teacher; the feature map is in neither."""
    other = save_model(tmp_path / "other", tokenizer, model__encoder__width=16, model__encoder__hidden=32)
    start = dict(init__path=other, train__steps=1, eval__sources={})
    assert main(tiny_arguments(tmp_path / "run", **settings(teacher, **start))) == 2
    assert "lacks: 'feature_map/kernel'. Initialise it by init.reinit=" in capsys.readouterr().err
    assert main(tiny_arguments(tmp_path / "run", **settings(teacher, **start, init__reinit="('feature_map',)"))) == 0
    output = capsys.readouterr().out
    assert f"parameters of {other}:1: 31 tensors loaded" in output and f"teacher: 31 tensors of {teacher}:1" in output


def test_student_loads_like_a_pretrained_model(run, tmp_path, capsys):
    """Encoder, whole model, export, and the start of another run: all without the teacher."""
    loaded = load(str(run))
    assert set(loaded.params) == {"encoder", "decoder"} and loaded.config.task == "pretrain"
    assert loaded.task.weights == {"image": 0.4, "text": 1.0}
    assert loaded.at_resolution(Resolution(56)).config.grid == (4, 4)
    state = saved(run, STEPS)
    encoder = load_encoder(run)
    for name, leaf in paths(state.params["encoder"]).items():
        np.testing.assert_array_equal(paths(encoder.params["encoder"])[name], leaf, name)
    assert export([f"--checkpoint={run}", f"--output={tmp_path}/whole", "--format=orbax", "--whole"]) == 0
    assert set(load(str(tmp_path / "whole")).params) == {"encoder", "decoder"}
    config = tiny_config(model__encoder__width=16, model__encoder__hidden=32, init__ignore="('feature_map',)")
    setup, source = build_setup(config), RunWeights(str(run))
    params, report = warm_start(setup, random_state(setup).params, config.init, source)
    assert "ignored: feature_map/kernel" in report and "teacher" not in report
    for name, leaf in paths(state.params["decoder"]).items():
        np.testing.assert_array_equal(paths(params["decoder"])[name], leaf, name)


@pytest.mark.parametrize("kind", ["hf", "whole export"])
def test_teacher_of_every_kind_is_read(kind, teacher, exported, tmp_path, tokenizer):
    """Exports give the arrays of the run that they were made from; a file's encoder serves features alone."""
    path, changes = exported, dict(distill__logits=0.0, distill__pixels=0.0)
    if kind == "whole export":
        path, changes = tmp_path / "whole", {}
        assert export([f"--checkpoint={teacher}", f"--output={path}", "--format=orbax", "--whole"]) == 0
    read = []
    for source in (teacher, path):
        config = tiny_config(**settings(source, **changes))
        setup, weights = build_setup(config), open_teacher(config)
        check_teacher(setup, weights, tokenizer)
        read.append(paths(jax.device_get(read_teacher(setup, weights)[0])))
    assert read[0].keys() == read[1].keys()
    for name, leaf in read[0].items():
        np.testing.assert_array_equal(read[1][name], leaf, name)


REFUSED = {
    "width": (dict(distill__encoder__width=64), "another distill.encoder.width: '32 there, 64 here'"),
    "depth": (dict(distill__encoder__depth=3), "another distill.encoder.depth"),
    "positions": (dict(distill__encoder__position="sincos"), "another distill.encoder.position"),
    "patches": (dict(model__patch_size=7), "another model.patch_size: '14 there, 7 here'"),
    "statistics": (dict(model__pixel_std="(1.0, 1.0, 1.0)"), "another model.pixel_std"),
    "grid": (dict(data__image_size=56), r"learned positions fit only.*28 px there, 56 here.*distill\.image_size=28"),
    "decoder": (dict(distill__decoder__heads=4), "another distill.decoder.heads: '2 there, 4 here'"),
    "decoder's kind": (dict(distill__decoder__kind="separate"), "another distill.decoder.kind"),
    "vocabulary": (dict(model__decoder__vocab_size=2048), "another model.decoder.vocab_size"),
    "captions": (dict(model__decoder__text_length=16), "another model.decoder.text_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_teacher_of_other_sizes_is_refused(case, teacher):
    """The first difference is named with both values, from metadata alone."""
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        open_teacher(tiny_config(**settings(teacher, **changes)))


def test_teacher_without_what_the_losses_need_is_refused(teacher, exported, tmp_path):
    """An encoder alone, a decoder that was not trained to predict patches, and one of another tokenizer."""
    with pytest.raises(UserError, match=r"distill\.logits needs a teacher with a decoder.*an encoder alone"):
        open_teacher(tiny_config(**settings(exported, distill__pixels=0.0)))
    captioner = save_model(tmp_path / "captioner", "0" * 16, loss__image=False)
    with pytest.raises(UserError, match=r"distill\.pixels needs a teacher that was trained with the image loss"):
        open_teacher(tiny_config(**settings(captioner)))
    config = tiny_config(**settings(captioner, distill__pixels=0.0))
    with pytest.raises(UserError, match=r"trained with another tokenizer: 'digest 0{16} there, x here'"):
        check_teacher(build_setup(config), open_teacher(config), "x")


def test_command_refuses_a_teacher_before_it_compiles(teacher, tmp_path, capsys, monkeypatch):
    """One line and exit code 2, for a teacher that does not fit and for none."""
    initialised = []
    monkeypatch.setattr(TrainSetup, "init", initialised.append)
    assert main(tiny_arguments(tmp_path / "run", **settings(teacher, distill__encoder__depth=3))) == 2
    assert "another distill.encoder.depth: '2 there, 3 here'" in capsys.readouterr().err
    assert main(tiny_arguments(tmp_path / "run", **settings(tmp_path / "nowhere"))) == 2
    assert "config distill.path: no such folder" in capsys.readouterr().err
    assert not initialised
