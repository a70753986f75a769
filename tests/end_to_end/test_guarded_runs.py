"""Runs with non-finite losses, with spikes, and with silent data corruption.

The faults are injected into the task by example index; the code under test is unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aimv2_jax.checkpoint import layout
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.errors import EXIT_FINISHED, TrainingAborted, UserError
from aimv2_jax.monitoring.events import read_events
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.monitoring.nonfinite import write_record
from aimv2_jax.train import loop, sdc_check, trainer
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.pretrain_task import PretrainTask
from aimv2_jax.train.replay import replay
from aimv2_jax.train.sdc_check import SdcCheck
from tests.helpers.bytes_tokenizer import BytesTokenizer
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import saved_state
from tests.helpers.tiny import only_devices, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

BATCH = 16
# One list for all tests with non-finite losses, and one for all with spikes, because they are compiled into the step.
NOT_FINITE = (5, 6, 12, 13, 14)
SPIKES = (44, 70)
SETTINGS = dict(
    eval__sources={},
    train__log_every=1,
    train__save_every=10,
    train__steps=50,
)


def settings(**changes):
    return SETTINGS | changes


def train(workdir: Path, skip_examples=None, **changes) -> int:
    config = tiny_config(**settings(**changes))
    tokenizer = BytesTokenizer("", config.model.decoder.text_length)
    return trainer.train(config, workdir, tokenizer, skip_examples=skip_examples)


@functools.cache  # Equal corruptions are one function, so that `shared_programs` knows them as one.
def corrupted_sums(batches: tuple[int, ...], factor: float):
    """The task's `loss_sums` with losses and gradients of the given batches multiplied by `factor`."""
    original = PretrainTask.loss_sums

    def loss_sums(self, params, batch, prefix):
        number = batch["example_index"][:, 1].min() // BATCH
        scale = jnp.where(jnp.isin(number, jnp.array(batches)), factor, 1.0)
        return {name: total * scale for name, total in original(self, params, batch, prefix).items()}

    return loss_sums


@contextlib.contextmanager
def corrupted(batches: tuple[int, ...], factor: float):
    """Runs within multiply the losses and gradients of the given batches by `factor`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainTask, "loss_sums", corrupted_sums(batches, factor))
        yield


def state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the leaves of a saved step by name."""
    leaves = CheckpointReader(workdir).meta(step)["leaves"]
    return dict(zip(leaves, saved_state(workdir, step, **settings()), strict=True))


def changed_parts(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    """Returns the top-level names of the leaves that differ."""
    return {name.partition("/")[0] for name in a if a[name].tobytes() != b[name].tobytes()}


def test_step_when_its_gradient_is_nan_then_nothing_but_the_count_of_steps_changes_and_a_replay_is_the_same(
    tmp_path, capsys
):
    """Batches 5 and 6 are used by steps 6 and 7."""
    with corrupted(NOT_FINITE, np.nan):
        assert train(tmp_path, train__steps=8, train__save_every=1, train__keep=9) == EXIT_FINISHED
        output = capsys.readouterr().out
        assert "loss is nan at step 6: its update is skipped (1 in a row, 3 end the run)" in output
        # No checkpoint is saved after a non-finite step until the next finite one.
        assert CheckpointReader(tmp_path).steps() == [1, 2, 3, 4, 5, 8]
        lines = {line["step"]: line for line in read_metrics(tmp_path)[0]}
        assert lines[6]["loss"] is None and [lines[i]["skipped"] for i in range(5, 9)] == [0, 1, 1, 0]
        assert lines[6]["param_norm"] == lines[7]["param_norm"] == lines[8]["param_norm"] != lines[5]["param_norm"]
        assert lines[6]["lr"] == lines[7]["lr"] == lines[8]["lr"]  # The rate follows the number of updates.
        record = json.loads((tmp_path / "nonfinite/6.json").read_text())
        assert record["batch"] == 5 and record["examples"] == [80, 96] and record["metrics"]["loss"] == "nan"

        config = tiny_config(**settings(train__steps=8))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert replay(config, tmp_path, BytesTokenizer("", config.model.decoder.text_length), 6) == EXIT_FINISHED
        longer = tiny_config(**settings(train__steps=80, train__log_every=5))
        with pytest.raises(
            UserError, match=r"--replay is a step that the run has not reached: 14\. Give a step up to 13"
        ):
            replay(longer, tmp_path, None, 14)
        output = capsys.readouterr().out
        assert "training from step 5 to step 6" in output and "batch 5, examples 80 to 95, seed 0" in output
        assert "all metrics are those of the run, bit for bit" in output
        assert "encoder/patch_embed" in output and "of the gradient" in output
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        # Step 7 is saved as the last step: its state equals that of step 5 bit for bit.
        other = tmp_path / "other"
        assert train(other, train__steps=7, train__save_every=5) == EXIT_FINISHED
    assert changed_parts(state(other, 5), state(other, 7)) == {"step", "anomaly"}
    assert state(other, 7)["anomaly/nonfinite"] == 2


def test_run_when_m_steps_in_a_row_are_not_finite_then_stopped_and_again_when_it_is_started_again(tmp_path):
    with corrupted(NOT_FINITE, np.nan):
        for _ in range(2):
            with pytest.raises(TrainingAborted, match="nan at step 15, the last of 3 non-finite steps in a row"):
                train(tmp_path, train__steps=20)
    assert CheckpointReader(tmp_path).steps() == [10]
    assert [event.values["code"] for event in read_events(tmp_path) if event.kind == "stop"] == [3, 3]
    assert train(tmp_path, train__steps=20) == EXIT_FINISHED


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Path:
    """A run that skips batches 35 to 44 from the start."""
    workdir = tmp_path_factory.mktemp("without") / "run"
    assert train(workdir, skip_examples=(35 * BATCH, 45 * BATCH), train__keep=5) == EXIT_FINISHED
    return workdir


def step_lines(workdir: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["images/photo"]) for line in read_metrics(workdir)[0]]


def test_run_when_a_loss_is_tenfold_then_it_goes_back_and_is_exactly_the_run_without_those_batches(
    without, tmp_path, monkeypatch, capsys
):
    barriers, changes = [], dict(guard__spike="rewind", guard__rewind_batches=10)
    monkeypatch.setattr(loop.coordination, "barrier", lambda name, timeout_s: barriers.append(name))
    with corrupted(SPIKES, 10.0):
        assert train(tmp_path, **changes) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert "rewinding to step 30, skipping batches 35 to 44 (1 of 20)" in output
    assert step_lines(tmp_path) == step_lines(without)
    ours, theirs = state(tmp_path, 50), state(without, 50)
    assert not changed_parts(ours, theirs)
    extra = CheckpointReader(tmp_path).meta(50)["extra"]
    assert (extra["skips"], extra["rewinds"], extra["data"]["tokenizer"]) == ([[35, 45]], 1, "bytes")
    [rewind] = [event for event in read_events(tmp_path) if event.kind == "rewind"]
    assert rewind.values == {"from_step": 45, "to_step": 30, "a": 35, "b": 45}
    assert list((tmp_path / "checkpoints").glob("rewound-40-*"))  # Renamed, not deleted.
    # A process waits for the others once, also if it resumes such a run.
    assert barriers == ["first batch"]
    assert train(tmp_path, train__steps=51, **changes) == EXIT_FINISHED
    assert barriers == ["first batch"] * 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["after", pytest.param("before", marks=pytest.mark.slow)])
def test_run_when_killed_around_a_rewind_then_the_next_start_decides_the_same(without, tmp_path, monkeypatch, moment):
    """Kills the run before newer checkpoints are set aside, or right after."""
    original = Checkpointer.set_aside_newer

    def killed(self, step, why):
        if moment == "after":
            original(self, step, why)
        raise Killed

    changes = dict(guard__spike="rewind", guard__rewind_batches=10)
    with corrupted(SPIKES, 10.0):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Checkpointer, "set_aside_newer", killed)
            train(tmp_path, **changes)
        assert CheckpointReader(tmp_path).steps() == ([30, 40] if moment == "before" else [30])
        assert train(tmp_path, **changes) == EXIT_FINISHED
    assert not changed_parts(state(tmp_path, 50), state(without, 50))
    assert step_lines(tmp_path) == step_lines(without)


def test_run_when_every_course_has_spikes_then_it_gives_up_after_so_many(tmp_path):
    with (
        corrupted(SPIKES, 10.0),
        pytest.raises(TrainingAborted, match=r"rewound 1 times already, the limit of guard.max_rewinds"),
    ):
        train(tmp_path, guard__spike="rewind", guard__rewind_batches=2, guard__max_rewinds=1, train__steps=80)
    assert read_events(tmp_path)[-1].step > SPIKES[0] + 2


def test_run_when_a_spike_is_to_be_skipped_then_its_update_alone_is_left_out(tmp_path, capsys):
    with corrupted(SPIKES, 10.0):
        for steps, save_every in ((44, 0), (46, 1)):  # Step 44 is saved as the last one.
            changes = dict(guard__spike="skip", train__steps=steps, train__save_every=save_every, train__keep=5)
            assert train(tmp_path, **changes) == EXIT_FINISHED
    assert "; its update is skipped" in capsys.readouterr().out
    assert changed_parts(state(tmp_path, 44), state(tmp_path, 45)) == {"step", "anomaly"}
    assert changed_parts(state(tmp_path, 45), state(tmp_path, 46)) == {"step", "anomaly", "params", "opt_state"}
    [spike] = [event for event in read_events(tmp_path) if event.kind == "spike"]
    assert spike.step == 45 and spike.values["action"] == "skip"


def test_examples_when_jumped_over_by_hand_then_no_step_has_them_and_the_same_command_again_changes_nothing(without):
    assert CheckpointReader(without).meta(40)["extra"]["skips"] == [[35, 45]]
    [skip] = [event for event in read_events(without) if event.kind == "skip"]
    assert (skip.values["a"], skip.values["b"]) == (35, 45)
    again = (35 * BATCH, 45 * BATCH)
    assert train(without, skip_examples=again, train__steps=52, train__keep=5) == EXIT_FINISHED
    with pytest.raises(UserError, match="trained on already, in the 52 saved steps"):
        train(without, skip_examples=(3, 4), train__steps=54, train__keep=5)


# --- silent data corruption -----------------------------------------------------------------------------------------


def flipped(tree, rng: np.random.Generator):
    """Flips one bit of one leaf on one device; returns the tree and the leaf's path."""
    leaves = jax.tree.leaves_with_path(tree)
    index = rng.integers(len(leaves))
    path, leaf = leaves[index]
    shards = [np.array(shard.data) for shard in leaf.addressable_shards]
    part = shards[rng.integers(len(shards))].reshape(-1).view(np.uint8)
    part[rng.integers(part.size)] ^= 1 << int(rng.integers(8))
    devices = [shard.device for shard in leaf.addressable_shards]
    arrays = [jax.device_put(data, device) for data, device in zip(shards, devices, strict=True)]
    changed = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
    flat = [leaf for _, leaf in leaves]
    flat[index] = changed
    return jax.tree.unflatten(jax.tree.structure(tree), flat), jax.tree_util.keystr(path, simple=True, separator="/")


# One mesh and interval for both tests of runs, which so share the two compiled steps.
FOUR_DEVICES = dict(mesh__data=2, mesh__fsdp=2, guard__sdc_check_every=5)


@pytest.mark.parametrize(("devices", "trials"), [(4, 5), pytest.param(1, 100, marks=pytest.mark.slow)])
def test_step_when_computed_twice_then_the_same_and_a_flipped_bit_is_found_every_time(
    tmp_path, monkeypatch, devices, trials
):
    """With four devices the second computation has each shard on another device."""
    changes = FOUR_DEVICES if devices == 4 else dict(mesh__data=1, guard__sdc_check_every=5)
    rng, original, found = np.random.default_rng(0), SdcCheck.differences, []

    def tried(self, first, second):
        assert original(self, first, second) == []
        copies = jax.tree.map(jnp.copy, first)
        monkeypatch.setattr("aimv2_jax.train.sdc_check._moved", lambda tree, *_: tree)
        for _ in range(trials):
            corrupt, path = flipped(copies, rng)
            [difference] = original(self, first, corrupt)
            found.append(difference.leaf == path and difference.entries == 1 and len(difference.devices) == 1)
        raise TrainingAborted("tried")

    monkeypatch.setattr(SdcCheck, "differences", tried)
    with only_devices(devices), pytest.raises(TrainingAborted, match="tried"):
        train(tmp_path, train__steps=5, **changes)
    assert found == [True] * trials


def held_bytes() -> int:
    """Bytes held by all devices, counting a buffer shared by several arrays once, by its address."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


def test_comparison_when_on_the_same_devices(monkeypatch):
    """The comparison copies neither result, since a third state might not fit in memory."""
    check, count, held = (
        SdcCheck(build_setup(tiny_config()), {}, rotate_devices=False),
        sdc_check._count_differences,
        [],
    )
    monkeypatch.setattr(sdc_check, "_count_differences", lambda *parts: (held.append(held_bytes()), count(*parts))[1])
    first, second = jax.device_put(jnp.ones(1 << 16)), jax.device_put(jnp.ones(1 << 16).at[5].set(2))
    before = held_bytes()
    [difference] = check.differences({"w": first}, {"w": second})
    assert difference.entries == 1 and held[0] - before < first.nbytes / 2


def test_comparison_when_on_other_devices():
    """The second result is freed leaf by leaf; byte counts would not show it, since CPU copies share buffers."""
    setup = build_setup(tiny_config())
    check = SdcCheck(setup, {}, rotate_devices=True)
    ones = {name: jax.device_put(jnp.ones(64), setup.batch_sharding) for name in "ab"}
    rotated = {
        name: jax.device_put(jnp.ones(64), NamedSharding(check._check_mesh, P(*leaf.sharding.spec)))
        for name, leaf in ones.items()
    }
    assert check.differences(ones, rotated) == []
    assert all(leaf.is_deleted() for leaf in rotated.values()) and not any(leaf.is_deleted() for leaf in ones.values())


def test_run_when_a_device_computes_wrongly_then_stopped_before_the_save_naming_leaf_and_device(tmp_path, monkeypatch):
    start, rng = SdcCheck.start, np.random.default_rng(1)

    def broken(self, state, batch, shape):
        again = start(self, state, batch, shape)
        return flipped(again, rng)[0] if int(again[0].step) == 10 else again

    monkeypatch.setattr(SdcCheck, "start", broken)
    message = r"step 10, computed twice, differs: .* entries, on .*; nothing of it is saved"
    with only_devices(4), pytest.raises(TrainingAborted, match=message):
        train(tmp_path, train__steps=20, **FOUR_DEVICES)
    assert CheckpointReader(tmp_path).steps() == []
    [event] = [event for event in read_events(tmp_path) if event.kind == "corruption"]
    assert event.step == 10 and event.values["device"]


@pytest.mark.parametrize("process", [0, 1])
def test_nonfinite_record_when_it_cannot_be_written(tmp_path, monkeypatch, capsys, process):
    """One process writes the record; a failure is logged and does not end the run."""
    monkeypatch.setattr(jax, "process_index", lambda: process)
    record = partial(write_record, tmp_path, 6, {"batch": 5}, {"loss": np.nan})
    file = tmp_path / "nonfinite/6.json"
    assert record() == (None if process else str(file)) and file.exists() != bool(process)
    shutil.rmtree(tmp_path / "nonfinite", ignore_errors=True)
    (tmp_path / "nonfinite").touch()  # A file blocks the folder.
    assert record() is None
    assert ("the record of step 6 could not be written: " in capsys.readouterr().out) != bool(process)


# --- saves that fail ------------------------------------------------------------------------------------------------


def watchdogs(monkeypatch) -> list:
    """Collects the watchdogs of the runs that start from now on."""
    started, start = [], trainer._start_watchdog
    monkeypatch.setattr(trainer, "_start_watchdog", lambda *args: started.append(start(*args)) or started[-1])
    return started


def test_save_when_a_guard_ends_the_run(tmp_path, monkeypatch):
    """The watchdog covers the waits for the save, since a hanging disk would block the run indefinitely."""
    started, wait, seen = watchdogs(monkeypatch), Checkpointer.wait, []

    def watched(self):
        seen.append([(watch.what, watch.step) for watch in started[0]._open])
        wait(self)

    monkeypatch.setattr(Checkpointer, "wait", watched)
    with corrupted(NOT_FINITE, np.nan), pytest.raises(TrainingAborted, match="there is no checkpoint yet"):
        train(tmp_path, train__steps=20, train__save_every=0)
    assert seen == [[("save", 15)], [("save", 15)]]  # Once for the message, once at the end.


def test_run_when_a_save_fails_just_before_a_spike(tmp_path, monkeypatch, capsys):
    """The run rewinds anyway, logs the failed save and repeats it."""
    started, seen, fails = watchdogs(monkeypatch), [], iter([40])
    commit, settle, check = layout.commit, Checkpointer.settle, Checkpointer.check_errors

    def full(folder, name, step, about):
        if step == 40 and next(fails, None) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        commit(folder, name, step, about)

    def watched(self):
        seen.append([watch.what for watch in started[0]._open])
        settle(self)

    monkeypatch.setattr(layout, "commit", full)
    monkeypatch.setattr(Checkpointer, "settle", watched)
    # Simulates a slow disk: the failure is seen only after the rewind.
    monkeypatch.setattr(Checkpointer, "check_errors", lambda self: check(self) if seen else None)
    with corrupted(SPIKES, 10.0):
        assert train(tmp_path, guard__spike="rewind", guard__rewind_batches=10, train__keep=9) == EXIT_FINISHED
    output = capsys.readouterr().out
    assert "rewinding to step 30" in output and "step 40, which needs" in output
    assert "once more, with step 31" in output
    assert seen == [["save"], ["start"]] and CheckpointReader(tmp_path).steps() == [10, 20, 30, 31, 40, 50]


# In the second case the updates of steps 13 and 14 are skipped.
@pytest.mark.parametrize(("nonfinite", "instead"), [pytest.param(False, 13, marks=pytest.mark.slow), (True, 15)])
def test_run_when_a_save_failed_in_the_background_then_the_next_step_is_saved_instead(
    tmp_path, monkeypatch, capsys, nonfinite, instead
):
    original, failures = (
        Checkpointer.check_errors,
        iter([None] * 12 + [UserError("could not write", "no room", "Make it")]),
    )
    monkeypatch.setattr(Checkpointer, "check_errors", lambda self: next(failures, None) or original(self))
    skipped = (14 * BATCH, 15 * BATCH) if nonfinite else None
    with corrupted(NOT_FINITE, np.nan) if nonfinite else contextlib.nullcontext():
        assert train(tmp_path, skipped, train__steps=20, train__keep=9) == EXIT_FINISHED
    assert CheckpointReader(tmp_path).steps() == [10, instead, 20]
    assert "could not write: 'no room'. Make it. The save is tried once more, with step 13" in capsys.readouterr().out
    [event] = [event for event in read_events(tmp_path) if event.kind == "save_failed"]
    assert event.step == 13
