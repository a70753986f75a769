"""Runs of LiT and of distillation: resume, frozen parameters, held-out losses, and the report."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.data.tokenizer import load_tokenizer
from aimv2_jax.main import main
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.monitoring.report import main as report
from aimv2_jax.pretrained.encoder import load_encoder
from aimv2_jax.train.builder import build_setup
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import assert_bitwise
from tests.helpers.tiny import TASKS, only_devices, tiny_arguments, tiny_config
from tests.helpers.trained_run import save_model

pytestmark = pytest.mark.usefixtures("shared_programs")

SHORT = dict(
    train__log_every=1,
    train__save_every=2,
    train__keep=4,
    data__batch_size=8,
    eval__batch_size=8,
    eval__max_examples=8,
)
SOURCES = {"lit": "init__path", "distill": "distill__path"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, Path]:
    """Saved models: an encoder for LiT, and a teacher of the size that the tiny distillation expects."""
    folder = tmp_path_factory.mktemp("sources")
    teacher = {
        key.replace("distill__", "model__"): value
        for key, value in TASKS["distill"].items()
        if key.startswith(("distill__encoder", "distill__decoder"))
    }
    tokenizer = load_tokenizer(tiny_config()).digest[:16]
    for name, changes in (("lit", {}), ("distill", teacher)):
        with only_devices(1):
            save_model(folder / name, tokenizer, **changes)
    return {name: folder / name for name in SOURCES}


def settings_of(task: str, source: dict[str, Path]) -> dict[str, object]:
    settings = SHORT | TASKS[task] | {SOURCES[task]: source[task]}
    if task == "lit":
        settings |= {"init__parts": "encoder", "init__reinit": "()"}
    return settings


@pytest.fixture(scope="module", params=sorted(SOURCES))
def straight(request, source, tmp_path_factory) -> tuple[str, dict[str, object], Path]:
    """A task's settings and its run of four steps."""
    settings, workdir = settings_of(request.param, source), tmp_path_factory.mktemp("run")
    with only_devices(1):
        assert main(tiny_arguments(workdir, **settings | dict(train__steps=4))) == 0
    return request.param, settings, workdir


def state_of(workdir: Path, step: int, settings: dict[str, object]):
    with only_devices(1):
        return CheckpointReader(workdir).restore(step, build_setup(tiny_config(**settings)).abstract_state)


def test_run_when_resumed(straight, source, tmp_path):
    """A resumed run has all bits of an uninterrupted one, also where the files that it started from are gone."""
    task, settings, workdir = straight
    with only_devices(1):
        assert main(tiny_arguments(tmp_path, **settings | dict(train__steps=2))) == 0
        moved = settings | {SOURCES[task]: tmp_path / "gone"}
        assert main(tiny_arguments(tmp_path, **moved | dict(train__steps=4))) == 0
    assert_bitwise(*(jax.tree.leaves(jax.device_get(state_of(run, 4, settings))) for run in (workdir, tmp_path)))
    lines = [read_metrics(run)[0] for run in (workdir, tmp_path)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


def test_frozen_parameters_keep_their_bits(straight, source):
    """They are those of the source, before and after, and have neither moments nor an average."""
    task, settings, workdir = straight
    before, after = (state_of(workdir, step, settings) for step in (2, 4))
    assert_bitwise(*(jax.tree.leaves(jax.device_get(state.frozen)) for state in (before, after)))
    encoder = after.frozen["encoder"] if task == "lit" else after.frozen["teacher"]["encoder"]
    theirs = load_encoder(source[task]).params["encoder"]
    assert_bitwise(*(jax.tree.leaves(jax.device_get(tree)) for tree in (dict(encoder), dict(theirs))))
    assert jax.tree.structure(after.opt_state[1].mu) == jax.tree.structure(after.params)
    assert not set(after.params) & set(after.frozen)


def test_metrics_have_the_losses_of_the_task(straight):
    """In training and held out each is finite, and the total is their weighted sum."""
    _, settings, workdir = straight
    with only_devices(1):
        weights = build_setup(tiny_config(**settings)).task.weights
    training, [evaluation] = read_metrics(workdir)
    for line, prefix in ((training[-1], "loss"), (evaluation, "eval_loss")):
        for name in weights:
            assert np.isfinite(line[f"{prefix}_{name}"]), name
        total = sum(weight * line[f"{prefix}_{name}"] for name, weight in weights.items())
        assert line[prefix] == pytest.approx(total, rel=1e-5)


def test_report_of_another_task(straight, capsys):
    """The report reads such a run like any other, and draws its losses."""
    _, _, workdir = straight
    assert report([str(workdir)]) == 0
    assert "step 4" in capsys.readouterr().out


def test_encoder_of_the_run(straight):
    """Commands that take an encoder take these runs: LiT's frozen one, and the student."""
    task, settings, workdir = straight
    state = state_of(workdir, 4, settings)
    expected = state.frozen["encoder"] if task == "lit" else state.params["encoder"]
    ours = load_encoder(workdir).params["encoder"]
    assert_bitwise(*(jax.tree.leaves(jax.device_get(dict(tree))) for tree in (expected, ours)))
