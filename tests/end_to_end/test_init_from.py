"""Tests of runs that start from another model: tensors that are loaded, resized, initialised or rejected."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.config.schema import InitConfig
from aimv2_jax.errors import UserError
from aimv2_jax.export import __main__ as hf
from aimv2_jax.main import main
from aimv2_jax.models.position_embeddings import resize_positions
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.init_from import TOKENIZER_TENSORS, RunWeights, match, warm_start
from tests.helpers.golden_names import paths
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.tiny import TASKS, tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

OURS = {"encoder/position": (16, 8), "encoder/trunk/norm/scale": (8,), "decoder/begin": (4,)}


def init(**changes):
    return InitConfig(**{"path": "runs/a", "parts": "model", "ignore": (), "reinit": (), **changes})


def test_match_when_all_is_the_same_then_all_is_taken():
    matching = match(OURS, OURS, init())
    assert matching.taken == tuple(OURS)
    assert not (matching.resized or matching.initialised or matching.dropped)


def test_match_when_the_table_is_of_another_square_then_it_alone_is_resized():
    matching = match(OURS, OURS | {"encoder/position": (4, 8)}, init())
    assert matching.resized == ("encoder/position",) and len(matching.taken) == 2


def test_match_when_the_encoder_is_asked_then_the_decoders_stay_apart():
    theirs = {name: shape for name, shape in OURS.items() if name.startswith("encoder")} | {"decoder/other": (3,)}
    matching = match(OURS, theirs, init(parts="encoder"))
    assert matching.initialised == ("decoder/begin",) and matching.dropped == ("decoder/other",)


def test_match_when_named_in_the_config_then_left_and_initialised():
    theirs = OURS | {"encoder/extra/a": (1,), "encoder/extra/b": (2,)}
    matching = match(
        OURS | {"decoder/new": (5,)}, theirs, init(ignore=("encoder/extra",), reinit=("decoder/new", "decoder/begin"))
    )
    assert matching.dropped == ("decoder/begin", "encoder/extra/a", "encoder/extra/b")
    assert matching.initialised == ("decoder/begin", "decoder/new")


@pytest.mark.parametrize(
    ("ours", "theirs", "changes", "message"),
    [
        ({}, {"encoder/extra": (1,)}, {}, "has a tensor that this model lacks: 'encoder/extra'.*init.ignore"),
        (
            {"encoder/new": (1,)},
            {},
            {},
            "this model has a tensor that config init.path lacks: 'encoder/new'.*init.reinit",
        ),
        ({}, {"decoder/begin": (5,)}, {}, r"decoder/begin in another shape.*\(5,\) there, \(4,\) here.*init.reinit"),
        ({}, {"encoder/position": (15, 8)}, {}, "encoder/position in another shape"),
        ({}, {"encoder/position": (4, 9)}, {}, "encoder/position in another shape"),
        ({}, {}, {"ignore": ("encoder/trnuk",)}, "init.ignore names no tensor: 'encoder/trnuk'.*The tensors are"),
        ({}, {}, {"reinit": ("encoder/trnuk",)}, "init.reinit names no tensor"),
        (
            {},
            {},
            {"ignore": ("decoder/begin",)},
            "this model has a tensor that config init.path lacks: 'decoder/begin'",
        ),
    ],
)
def test_match_when_something_is_left_over_or_of_no_use_then_refused_by_name(ours, theirs, changes, message):
    with pytest.raises(UserError, match=message):
        match(OURS | ours, OURS | theirs, init(**changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run at 28 pixels, with four patches per image."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    assert main(tiny_arguments(workdir, train__steps=2, train__save_every=0, eval__sources={})) == 0
    return workdir


def saved_params(workdir, step, config):
    abstract = build_setup(config).abstract_state.params
    return CheckpointReader(workdir).restore_part(step, {"params": abstract})["params"]


def test_run_when_started_from_a_smaller_one_then_its_parameters_with_the_table_resized(small, tmp_path, capsys):
    theirs = saved_params(small, 2, tiny_config())
    config = tiny_config(data__image_size=56, init__path=str(small))
    setup = trainer.build_setup(config)
    params, report = warm_start(setup, setup.init().params, config.init, RunWeights(config.init.path))
    assert "1 x" not in report and "resized: encoder/position, 2 x 2 to 4 x 4 patches" in report
    expected = theirs | {
        "encoder": theirs["encoder"] | {"position": resize_positions(theirs["encoder"]["position"], (2, 2), (4, 4))}
    }
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    arguments = tiny_arguments(
        tmp_path, data__image_size=56, init__path=small, train__steps=2, train__save_every=1, eval__sources={}
    )
    assert main(arguments) == 0
    assert "parameters of" in capsys.readouterr().out
    # The checkpoints of its own workdir take precedence: the source may be gone.
    again = [argument.replace(str(small), str(tmp_path / "gone")) for argument in arguments] + [
        "--config.train.steps=3"
    ]
    assert main(again) == 0
    assert "continuing from step 2" in capsys.readouterr().out


def test_warm_start_when_the_tokenizer_is_another(small):
    """The rows of the token table would belong to other pieces."""
    config = tiny_config(init__path=str(small))
    setup, source = trainer.build_setup(config), RunWeights(config.init.path)
    ours, params = source.tokenizer, setup.init().params
    assert re.fullmatch(r"\w{16}", ours)
    with pytest.raises(UserError, match=rf"small:2 belongs to another tokenizer: 'digest {ours} there, x here'"):
        warm_start(setup, params, config.init, source, "x")
    for tokenizer in (ours, None):
        warm_start(setup, params, config.init, source, tokenizer)
    names = tuple(f"decoder/{name}" for name in TOKENIZER_TENSORS)
    apart = dataclasses.replace(config.init, ignore=names, reinit=names)
    assert "initialised: decoder/token_" in warm_start(setup, params, apart, source, "x")[1]


def test_text_tower_of_another_tokenizer():
    """The token table of a text tower belongs to its tokenizer, as a decoder's does."""
    config = tiny_config(**TASKS["lit"] | dict(init__path="lit", init__reinit="()"))
    setup = trainer.build_setup(config)
    params = setup.task.abstract_params
    shapes = {name: leaf.shape for name, leaf in paths(params).items()}
    source = SimpleNamespace(name="lit:1", tokenizer="theirs", shapes=shapes)
    with pytest.raises(UserError, match=r"token table of lit:1 belongs to another tokenizer.*text/token_table"):
        warm_start(setup, params, config.init, source, "ours")


def test_run_when_started_from_hugging_faces_folder_then_its_encoder(small, tmp_path, capsys, monkeypatch):
    assert hf.main([f"--checkpoint={small}", f"--output={tmp_path}/hf"]) == 0
    arguments = dict(init__path=tmp_path / "hf", train__steps=1, eval__sources={})
    assert main(tiny_arguments(tmp_path / "run", **arguments)) == 2
    assert "config init.path lacks: 'decoder/" in capsys.readouterr().err
    assert main(tiny_arguments(tmp_path / "run", **arguments, init__parts="encoder", model__encoder__heads=4)) == 2
    assert "another model.encoder.heads: '2 there, 4 here'" in capsys.readouterr().err
    starts, compile_step = [], TrainSetup.compile_step

    def watched(setup, shape):
        step = compile_step(setup, shape)
        return lambda state, *args: (starts.append(jax.device_get(state.params)), step(state, *args))[1]

    monkeypatch.setattr(TrainSetup, "compile_step", watched)
    assert main(tiny_arguments(tmp_path / "run", **arguments, init__parts="encoder")) == 0
    assert f"parameters of {tmp_path}/hf: 14 tensors loaded" in capsys.readouterr().out
    [taken], theirs = starts, saved_params(small, 2, tiny_config())
    jax.tree.map(np.testing.assert_array_equal, taken["encoder"], theirs["encoder"])
    assert not np.array_equal(taken["decoder"]["begin"], theirs["decoder"]["begin"])


def test_run_when_what_it_starts_from_kept_an_average_then_that(tmp_path, capsys):
    ema = dict(optimizer__ema_decay=0.8, train__steps=2, train__save_every=0, eval__sources={})
    assert main(tiny_arguments(tmp_path / "ema", **ema)) == 0
    config = tiny_config(init__path=str(tmp_path / "ema"))
    setup = trainer.build_setup(config)
    params, _ = warm_start(setup, setup.init().params, config.init, RunWeights(config.init.path))
    abstract = dict.fromkeys(("ema_params", "params"), setup.abstract_state.params)
    saved = CheckpointReader(tmp_path / "ema").restore_part(2, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, saved["ema_params"])
    assert not np.array_equal(params["decoder"]["begin"], saved["params"]["decoder"]["begin"])


def test_run_when_what_it_starts_from_is_not_there_then_one_line(tmp_path, capsys):
    assert main(tiny_arguments(tmp_path, init__path=tmp_path / "nowhere", eval__sources={})) == 2
    error = capsys.readouterr().err
    assert "config init.path: no such folder" in error and "nowhere" in error
