"""Parameter average in a run: saved, resumed, evaluated, used for the best checkpoint, and loaded."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.main import main
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.pretrained.model import load
from aimv2_jax.train.builder import build_setup
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import assert_bitwise, saved_state
from tests.helpers.tiny import tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

DECAY = 0.8
AVERAGED = dict(optimizer__ema_decay=DECAY, train__save_every=1, train__keep=9)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of six steps, all saved, evaluated at steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("straight")
    assert main(tiny_arguments(workdir, **AVERAGED, train__steps=6, train__eval_every=3)) == 0
    return workdir


def test_average_when_a_run_keeps_it_then_the_weighted_mean_of_its_saved_parameters(straight):
    reader, abstract = CheckpointReader(straight), {"params": build_setup(tiny_config()).abstract_state.params}
    params_by_step = [reader.restore_part(step, abstract)["params"] for step in range(1, 7)]
    weights = DECAY ** np.arange(5, -1, -1.0)
    average = load(f"{straight}:6").params
    for leaf, *leaves in zip(*map(jax.tree.leaves, (average, *params_by_step))):
        expected = np.tensordot(weights / weights.sum(), np.stack(leaves), 1)
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    raw = load(f"{straight}:6", weights="raw").params
    jax.tree.map(np.testing.assert_array_equal, raw, params_by_step[-1])
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (average, raw))))


def test_average_when_evaluated_then_its_figures_stand_beside_and_its_loss_chooses_the_best(straight):
    _, evaluation = read_metrics(straight)
    reader = CheckpointReader(straight)
    assert [line["step"] for line in evaluation] == [3, 6]
    for line in evaluation:
        names = {name.removesuffix("_ema") for name in line if name.endswith("_ema")}
        assert names == {"eval_loss", "eval_loss_image", "eval_loss_text", "eval_loss_text_full_prefix"} < set(line)
        assert line["eval_loss_ema"] != line["eval_loss"]
        assert reader.meta(line["step"])["eval_loss"] == line["eval_loss_ema"]


def test_run_when_it_keeps_an_average_and_is_resumed_then_bitwise_the_straight_one(straight, tmp_path):
    for steps in (2, 6):
        assert main(tiny_arguments(tmp_path, **AVERAGED | {"train__save_every": 0}, train__steps=steps)) == 0
    states = (saved_state(workdir, 6, optimizer__ema_decay=DECAY) for workdir in (straight, tmp_path))
    assert_bitwise(*states)


def test_state_when_no_average_is_kept_then_it_has_just_what_it_had():
    state = build_setup(tiny_config()).abstract_state
    assert state.ema_params is None
    assert {str(path[0]) for path, _ in jax.tree.leaves_with_path(state)} == {
        ".step",
        ".params",
        ".opt_state",
        ".anomaly",
    }
    averaged = build_setup(tiny_config(optimizer__ema_decay=DECAY)).abstract_state
    assert (
        jax.tree.map(str, averaged.ema_params) == jax.tree.map(str, averaged.params) == jax.tree.map(str, state.params)
    )
