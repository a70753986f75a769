"""End-to-end tests of cooldowns that branch off a trunk."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.data import pipeline
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, EXIT_USER
from aimv2_jax.main import main
from aimv2_jax.monitoring.counters import ExampleCounter
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.train.builder import TrainSetup, build_setup
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import assert_bitwise, saved_state
from tests.helpers.tiny import tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

TRUNK = {
    "optimizer__schedule": "half_cosine", "optimizer__schedule_steps": 24, "train__steps": 24, "train__save_every": 8,
    "train__keep": 1, "train__keep_steps": (10, 20), "train__log_every": 1, "optimizer__cooldown_share": 4 / 24,
    "eval__max_examples": 4, "eval__caption_types": "('alt',)", "eval__prefixes": "(0.5,)",
}  # fmt: skip


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    """A run of 24 steps, of which 10 and 20 are kept beside the newest and the best."""
    workdir = tmp_path_factory.mktemp("trunk")
    assert main(tiny_arguments(workdir, **TRUNK)) == EXIT_FINISHED
    return workdir


@pytest.fixture(scope="module")
def branch(trunk, tmp_path_factory) -> Path:
    """An uninterrupted cooldown from step 20."""
    workdir = tmp_path_factory.mktemp("branch")
    assert main(tiny_arguments(workdir, **cooling(trunk, 20))) == EXIT_FINISHED
    return workdir


def cooling(trunk: Path, step: int, **changes) -> dict:
    return TRUNK | {"train__cooldown_from": f"{trunk}:{step}"} | changes


def rates(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["lr"] for line in read_metrics(workdir)[0]}


def test_trunk_when_finished_then_its_branch_points_are_there_and_it_ends_half_the_way_down(trunk):
    assert CheckpointReader(trunk).steps() == [10, 20, 24]
    schedule = build_setup(tiny_config(**TRUNK)).schedule
    assert float(schedule(jnp.asarray(24))) == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-6)


def test_branch_when_finished_then_it_ran_its_share_and_was_evaluated(trunk, branch):
    training, evaluation = read_metrics(branch)
    assert [line["step"] for line in training] == [21, 22, 23, 24]
    assert [line["step"] for line in evaluation] == [24]
    assert CheckpointReader(branch).latest_step() == 24


def test_branch_when_it_starts_then_its_first_rate_is_the_trunks_and_falls_linearly(trunk, branch):
    top = rates(trunk)[21]
    expected = [1e-6 + (top - 1e-6) * left / 4 for left in (4, 3, 2, 1)]
    assert list(rates(branch).values()) == pytest.approx(expected, rel=1e-6)


def test_branch_when_it_starts_then_state_and_examples_are_the_trunks(trunk, branch, tmp_path, monkeypatch):
    states, examples = [], []
    compile_step, to_devices = TrainSetup.compile_step, pipeline.to_devices

    def watched_step(setup, shape):
        step = compile_step(setup, shape)
        return lambda state, *args: (states.append(jax.device_get(jax.tree.leaves(state))), step(state, *args))[1]

    def watched_batch(arrays, *args, **kwargs):
        if "source" in arrays:
            examples.append(arrays["example_index"])
        return to_devices(arrays, *args, **kwargs)

    monkeypatch.setattr(TrainSetup, "compile_step", watched_step)
    monkeypatch.setattr(pipeline, "to_devices", watched_batch)
    assert main(tiny_arguments(tmp_path, **cooling(trunk, 20))) == EXIT_FINISHED
    assert_bitwise(states[0], saved_state(trunk, 20, **TRUNK))
    assert np.concatenate(examples)[:, 1].tolist() == list(range(20 * 16, 24 * 16))
    first = {line["step"]: line["loss"] for line in read_metrics(trunk)[0]}[21]
    assert read_metrics(tmp_path)[0][0]["loss"] == first  # The learning rate affects the parameters only afterwards.
    assert_bitwise(saved_state(tmp_path, 24, **TRUNK), saved_state(branch, 24, **TRUNK))  # Both branches are equal.


def test_branch_when_stopped_and_its_trunk_is_gone_then_goes_on_bitwise_as_the_branch_in_one_go(
    trunk, branch, tmp_path, monkeypatch, capsys
):
    trunk_link, workdir = tmp_path / "trunk", tmp_path / "branch"
    trunk_link.symlink_to(trunk)
    with monkeypatch.context() as patched:
        add, seen = ExampleCounter.add, []

        def stopping(*args):
            seen.append(None)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)
            return add(*args)

        patched.setattr(ExampleCounter, "add", stopping)
        assert main(tiny_arguments(workdir, **cooling(trunk_link, 20))) == EXIT_RETRY
    assert CheckpointReader(workdir).steps() == [22]
    capsys.readouterr()
    trunk_link.unlink()  # A run's own checkpoints take precedence, and a trunk may move.
    moved_trunk = tmp_path / "elsewhere"
    assert main(tiny_arguments(workdir, **cooling(moved_trunk, 20))) == EXIT_FINISHED
    assert "continuing from step 22, cooling down until step 24" in capsys.readouterr().out
    assert_bitwise(saved_state(workdir, 24, **TRUNK), saved_state(branch, 24, **TRUNK))
    assert rates(workdir) == rates(branch)
    assert main(tiny_arguments(workdir, **cooling(moved_trunk, 20))) == EXIT_FINISHED
    assert "it has cooled down" in capsys.readouterr().out


def test_branch_when_its_trunk_skipped_a_step(tmp_path, monkeypatch, capsys):
    """The learning rate falls completely within the cooldown's steps, from the rate that the trunk had reached."""
    compile_step = TrainSetup.compile_step

    def compile_skipping(setup, shape):
        step = compile_step(setup, shape)

        def call(state, *args):
            if int(state.step) != 5:
                return step(state, *args)
            decoder = state.params["decoder"]
            begin = decoder["begin"]
            decoder["begin"] = jax.device_put(np.full(begin.shape, np.nan, np.float32), begin.sharding)
            after, metrics = step(state, *args)
            after.params["decoder"]["begin"] = begin
            return after, metrics

        return call

    changes = {"train__steps": 20, "eval__sources": {}}
    with monkeypatch.context() as patched:
        patched.setattr(TrainSetup, "compile_step", compile_skipping)
        assert main(tiny_arguments(tmp_path / "trunk", **TRUNK | changes)) == EXIT_FINISHED
    assert "its update is skipped" in capsys.readouterr().out
    assert main(tiny_arguments(tmp_path / "branch", **cooling(tmp_path / "trunk", 20, **changes))) == EXIT_FINISHED
    top = float(build_setup(tiny_config(**TRUNK)).schedule(jnp.asarray(19)))
    expected = [1e-6 + (top - 1e-6) * left / 4 for left in (4, 3, 2, 1)]
    assert list(rates(tmp_path / "branch").values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("step", "changes", "words"),
    [
        (15, {}, ["no checkpoint of this step", "15", "10, 20, 24"]),
        (20, {"seed": 3}, ["a run with another seed", "0 there, 3 here"]),
    ],
)
def test_branch_when_it_cannot_start_then_one_sentence_says_why(trunk, tmp_path, capsys, step, changes, words):
    assert main(tiny_arguments(tmp_path, **cooling(trunk, step, **changes))) == EXIT_USER
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_branch_when_put_into_its_trunks_folder_then_refused(trunk, capsys):
    assert main(tiny_arguments(trunk, **cooling(trunk, 20))) == EXIT_USER
    message = capsys.readouterr().err
    assert "config train.cooldown_from may not change" in message and "another --workdir" in message
