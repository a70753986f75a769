"""Checkpoints: a restored state is bitwise what was saved, also after failures."""

import contextlib
import errno
import functools
import gc
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.checkpoint import checkpointer as checkpointer_module
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, check_free_space, parse_spec, state_bytes
from aimv2_jax.config.load import config_to_dict
from aimv2_jax.errors import UserError
from tests.helpers.checkpoints import (
    CONFIG,
    abstract,
    assert_same,
    edit_meta,
    folders,
    make_config,
    make_state,
    save_all,
    sign_again,
)
from tests.helpers.full_disk import files_of_at_most

# --- round trip ----------------------------------------------------------------------------------------------------


def test_state_when_restored_then_bitwise_the_same_tree(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(3, state, CONFIG)
        assert_same(checkpointer.restore(3, abstract(state)), state)  # Waits for the save in progress.
    assert_same(CheckpointReader(tmp_path).restore(3, abstract(state)), state)


def test_meta_when_saved_then_it_holds_config_and_evaluation(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(3, make_state(), CONFIG, eval_loss=jnp.float32(0.5), extra={"skipped": [[4, 8]]})
        checkpointer.save(4, make_state(), CONFIG)
    meta = CheckpointReader(tmp_path).meta(3)
    assert (meta["format_version"], meta["step"], meta["eval_loss"]) == (5, 3, 0.5)
    assert meta["config"] == config_to_dict(CONFIG) and meta["extra"] == {"skipped": [[4, 8]]}
    assert meta["leaves"]["params/encoder/w"] == [[16, 8], "float32"]
    assert meta["leaves"]["opt_state/0/mu/scale"] == [[8], "bfloat16"]
    assert CheckpointReader(tmp_path).meta(4)["eval_loss"] is None


@pytest.mark.parametrize("num_devices", [1, 8])
def test_saved_state_buffers_donated_after_save(tmp_path, num_devices):
    """A saved state is that of its step even if its buffers are donated right after the save."""
    sharding = jax.NamedSharding(jax.make_mesh((num_devices,), ("data",)), jax.P("data"))
    train_step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jax.device_put(jnp.zeros((1024, 2048)), sharding), "b": jax.device_put(jnp.zeros(8), sharding)}
    shapes = abstract(state)
    probe = train_step(state)
    assert state["w"].is_deleted()  # This backend donates; otherwise the test would prove nothing.
    state = probe
    with Checkpointer(tmp_path, keep=10) as checkpointer:
        for step in range(1, 7):
            if step % 2 == 0:
                checkpointer.save(step, state, CONFIG)
            state = train_step(state)
        for step in (2, 4, 6):
            for leaf in jax.tree.leaves(checkpointer.restore(step, shapes)):
                np.testing.assert_array_equal(leaf, np.full(leaf.shape, step, np.float32))


def test_restore_onto_other_meshes(tmp_path):
    """A state restored onto another mesh is bitwise the same and has the requested sharding."""
    devices = np.array(jax.devices())
    assert devices.size == 8
    eight = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("fsdp",)), jax.P("fsdp"))
    state = {"w": jax.device_put(jnp.arange(64.0 * 32).reshape(64, 32), eight)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, CONFIG)
        for mesh, spec in [
            (jax.sharding.Mesh(devices.reshape(2, 4), ("data", "tensor")), jax.P("tensor", "data")),
            (jax.sharding.Mesh(devices[:2][::-1], ("fsdp",)), jax.P(None, "fsdp")),
            (jax.sharding.Mesh(devices[5:6], ("fsdp",)), jax.P()),
        ]:
            sharding = jax.sharding.NamedSharding(mesh, spec)
            restored = checkpointer.restore(1, abstract(state, sharding))
            assert restored["w"].sharding == sharding
            assert_same(restored, state)


def test_part_when_asked_for_then_only_that_is_returned(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(3, state, CONFIG)
    reader = CheckpointReader(tmp_path)
    assert_same(reader.restore_part(3, {"params": abstract(state.params)}), {"params": state.params})
    with pytest.raises(UserError, match="params/other is not in it"):
        reader.restore_part(3, {"params": {"other": abstract(state.params["scale"])}})


# --- strictness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"a": ((4, 2), "float32")}, r"b/c is in it and not in this model"),
        ({"a": ((4, 2), "float32"), "b": {"c": ((3,), "int32"), "d": ((), "int32")}}, r"b/d is not in it"),
        ({"a": ((2, 4), "float32"), "b": {"c": ((3,), "int32")}}, r"a is float32\[4,2\] in it, float32\[2,4\] here"),
        ({"a": ((4, 2), "bfloat16"), "b": {"c": ((3,), "int32")}}, r"a is float32\[4,2\] in it, bfloat16\[4,2\] here"),
        ({"a": ((4,), "float32"), "b": {"c": ((5,), "int32")}}, r"a is float32\[4,2\] in it, .*, and 1 more"),
    ],
    ids=["extra", "missing", "shape", "dtype", "two"],
)
def test_state_when_the_model_differs_then_user_error_names_the_array(tmp_path, wanted, message):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"a": jnp.ones((4, 2)), "b": {"c": jnp.ones(3, jnp.int32)}}, CONFIG)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf[0], leaf[1], sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        wanted,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    with pytest.raises(UserError, match=message):
        CheckpointReader(tmp_path).restore(1, shapes)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: '{"format_version": 5}',
        lambda text: '{"format_version": "one"}',
        lambda text: json.dumps({**json.loads(text), "format_version": "5"}),
        lambda text: json.dumps({**json.loads(text), "format_version": True}),
        lambda text: json.dumps({**json.loads(text), "leaves": {"w": [[2], None]}}),
        lambda text: json.dumps({**json.loads(text), "leaves": {"w": 7}}),
        lambda text: json.dumps({**json.loads(text), "eval_loss": "low"}),
        lambda text: "[" * 100_000,
    ],
)
def test_meta_when_it_cannot_be_understood(tmp_path, edit):
    save_all(tmp_path, {1: None})
    edit_meta(tmp_path, 1, edit)
    with pytest.raises(UserError, match=r"damaged checkpoint: .*/1: .meta/metadata: cannot be understood"):
        CheckpointReader(tmp_path).meta(1)


def test_meta_when_missing_from_a_step_then_damaged_and_not_absent(tmp_path):
    save_all(tmp_path, {1: None})
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "meta")
    with pytest.raises(UserError, match="damaged checkpoint"):
        CheckpointReader(tmp_path).best_step()


@pytest.mark.parametrize("has_manifest_of_it", [False, True])
@pytest.mark.parametrize(
    "harm",
    [
        lambda state: shutil.rmtree(state),
        lambda state: (state / "manifest.ocdbt").unlink(),
        lambda state: (state / "_METADATA").write_text("{"),
        lambda state: (state / "_METADATA").write_text("[" * 100_000),
        lambda state: (state / "_METADATA").write_text("[]"),
        lambda state: shutil.rmtree(state / "d"),
        lambda state: [file.write_bytes(b"") for file in (state / "d").iterdir()],
    ],
)
def test_state_when_its_files_are_damaged_then_user_error_names_it(tmp_path, harm, has_manifest_of_it):
    save_all(tmp_path, {1: None})
    harm(tmp_path / "checkpoints" / "1" / "state")
    if has_manifest_of_it:
        sign_again(tmp_path, 1)
    with pytest.raises(UserError, match=r"damaged checkpoint: .*/1: ['\"]state.*Name another step") as error:
        CheckpointReader(tmp_path).restore(1, abstract(make_state()))
    assert len(str(error.value)) < 700


def test_meta_when_a_pipe_then_damaged(tmp_path):
    save_all(tmp_path, {1: None, 2: None})
    for step, name in ((1, "meta/metadata"), (2, "manifest.json")):
        path = tmp_path / "checkpoints" / str(step) / name
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match=f"damaged checkpoint: .*/{step}: '{name}: it is not a regular file'"):
            CheckpointReader(tmp_path).meta(step)


def test_restore_error_many_damaged_arrays(tmp_path, monkeypatch, caplog):
    """A checkpoint with many damaged arrays raises one UserError, and nothing else is logged or reported."""
    state = {f"array{i}": jnp.ones((8, 8)) for i in range(60)}
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, state, CONFIG)
    for file in (tmp_path / "checkpoints" / "1" / "state" / "d").iterdir():
        file.write_bytes(b"")
    sign_again(tmp_path, 1)  # Otherwise the manifest check would fail first.
    stray = []
    monkeypatch.setattr(sys, "unraisablehook", stray.append)
    for _ in range(5):
        with pytest.raises(UserError, match="damaged checkpoint"):
            CheckpointReader(tmp_path).restore(1, abstract(state))
        gc.collect()  # Unretrieved exceptions are reported on collection.
    assert (stray, caplog.messages) == ([], [])


def test_workdir_when_relative_then_steps_are_saved_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_all("runs/here", {1: 2.0})
    assert parse_spec("runs/here:1") == ("runs/here", 1)
    assert_same(CheckpointReader("runs/here").restore(1, abstract(make_state())), make_state(1))


# --- retention -------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    "losses, keep, kept, best",
    [
        ({1: None, 2: None, 3: None}, 2, [2, 3], None),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 4.0}, 2, [2, 4, 5], 2),
        ({1: 3.0, 2: 2.0, 3: 1.0}, 1, [3], 3),
        ({1: 1.0, 2: None, 3: None}, 1, [1, 3], 1),
        ({1: 1.0, 2: 1.0, 3: 1.0}, 1, [1, 3], 1),
        ({1: 2.0, 2: NAN, 3: float("-inf")}, 1, [1, 3], 1),
        ({8: 1.0, 9: 2.0, 10: 3.0, 11: 3.0}, 2, [8, 10, 11], 8),
    ],
)
def test_steps_when_many_were_saved_then_the_newest_and_the_best_are_left(tmp_path, losses, keep, kept, best):
    with Checkpointer(tmp_path, keep) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step), CONFIG, loss)
        checkpointer.wait()
        assert (checkpointer.steps(), checkpointer.best_step(), checkpointer.latest_step()) == (kept, best, kept[-1])
    reader = CheckpointReader(tmp_path)
    assert (reader.steps(), reader.best_step(), reader.latest_step()) == (kept, best, kept[-1])
    assert folders(tmp_path) == sorted(map(str, kept))
    for step in kept:
        assert_same(reader.restore(step, abstract(make_state())), make_state(step))


def test_best_step_retained_after_restart(tmp_path):
    """The best step stays on disk after the run is restarted."""
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}.items():
        save_all(tmp_path, {step: loss}, keep=1)
    assert CheckpointReader(tmp_path).steps() == [2, 4]


def test_keep_steps_retained_over_restarts(tmp_path):
    """The steps in `keep_steps` stay on disk over restarts."""
    for steps in ((1, 2, 3), (4, 5, 6), (7, 8)):
        with Checkpointer(tmp_path, keep=1, keep_steps=(2, 4, 100)) as checkpointer:
            for step in steps:
                checkpointer.save(step, make_state(step), CONFIG)
    reader = CheckpointReader(tmp_path)
    assert reader.steps() == [2, 4, 8]
    assert_same(reader.restore(2, abstract(make_state())), make_state(2))


def test_best_when_evaluation_changed_on_a_resume_then_only_like_is_compared(tmp_path):
    moved = make_config(sources={"held_out": "/elsewhere/test"}, batch_size=3)
    other = make_config(prefixes=(0.5,))
    with Checkpointer(tmp_path, keep=10) as checkpointer:
        checkpointer.save(1, make_state(), CONFIG, 1.0)
        checkpointer.save(2, make_state(), moved, 2.0)
        checkpointer.wait()
        assert checkpointer.best_step() == 1
        checkpointer.save(3, make_state(), other, 5.0)
        checkpointer.save(4, make_state(), other, 6.0)
        checkpointer.wait()
        assert checkpointer.best_step() == 3


def test_folder_when_a_step_is_being_deleted_then_it_is_no_step_any_more(tmp_path, monkeypatch):
    seen = []
    rmtree = type(checkpointer_module.epath.Path(tmp_path)).rmtree

    def recording_rmtree(path, **options):
        if "-deleted" in path.name:
            seen.append((path.name, CheckpointReader(tmp_path).steps()))
        return rmtree(path, **options)

    monkeypatch.setattr(type(checkpointer_module.epath.Path(tmp_path)), "rmtree", recording_rmtree)
    save_all(tmp_path, {1: None, 2: None}, keep=1)
    [(name, steps)] = seen
    assert name.startswith("1.orbax-checkpoint-tmp-deleted-") and steps == [2]


# --- failures --------------------------------------------------------------------------------------------------------


def test_folder_when_opened_to_train_then_only_our_leftovers_are_swept(tmp_path):
    save_all(tmp_path, {1: None})
    checkpoints = tmp_path / "checkpoints"
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-deleted", "notes", "old.orbax-checkpoint-tmp"):
        (checkpoints / name / "state").mkdir(parents=True)
    assert CheckpointReader(tmp_path).steps() == [1]
    assert len(folders(tmp_path)) == 5  # Reading sweeps nothing, since a trainer may be running.
    with Checkpointer(tmp_path, keep=1):
        assert folders(tmp_path) == ["1", "notes", "old.orbax-checkpoint-tmp"]


KILLED_IN_A_SAVE = """
import os, signal, sys, time
from pathlib import Path
import jax
from tests.helpers import checkpoints as test

workdir = Path(sys.argv[1])
checkpointer = test.Checkpointer(workdir, keep=2)
checkpointer.save(1, test.make_state(1), test.CONFIG)
checkpointer.wait()
checkpointer.save(2, {"w": jax.random.normal(jax.random.key(0), (32, 1024, 1024))}, test.CONFIG)
half_written = "2.orbax-checkpoint-tmp-saving-*.orbax-checkpoint-tmp/state*/**/d/*"
while not any(path.stat().st_size for path in (workdir / "checkpoints").glob(half_written)):
    assert not (workdir / "checkpoints" / "2").exists(), "the save was faster than the kill"
    time.sleep(0.0005)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_partial_save_after_kill(tmp_path):
    """A step whose save was killed midway is ignored, and a later run can save it again."""
    root = Path(__file__).parents[2]
    script = f"import sys; sys.path.insert(0, {str(root)!r})\n{KILLED_IN_A_SAVE}"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    committed, partial = folders(tmp_path)
    assert committed == "1" and re.fullmatch(r"2(\.orbax-checkpoint-tmp-saving-\w{8})\.orbax-checkpoint-tmp", partial)
    reader = CheckpointReader(tmp_path)
    assert (reader.steps(), parse_spec(f"{tmp_path}:last")) == ([1], (str(tmp_path), 1))
    assert_same(reader.restore(1, abstract(make_state())), make_state(1))
    save_all(tmp_path, {2: None})
    assert_same(reader.restore(2, abstract(make_state())), make_state(2))
    assert folders(tmp_path) == ["1", "2"]


def _failure_of(action):
    with pytest.raises(UserError) as caught:
        action()
    return caught.value


def test_save_error_disk_full(tmp_path, monkeypatch, caplog):
    """A save to a full disk leaves the last good step untouched, and the error says so."""
    big = {f"w{i}": jax.random.normal(jax.random.key(i), (256, 64)) for i in range(16)}
    stray = []
    monkeypatch.setattr(sys, "unraisablehook", stray.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: stray.append(error))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        checkpointer.wait()
        with files_of_at_most(64 * 1024):
            checkpointer.save(2, big, CONFIG)
            error = _failure_of(checkpointer.wait)
        message = str(error)
        assert "checkpoint of step 2, which needs 1.0 MiB (" in message and " free)" in message
        assert error.value == "File too large" and "the last good one, step 1, is untouched" in message
        checkpointer.check_errors()  # Reported only once.
        assert checkpointer.steps() == [1]
        assert_same(checkpointer.restore(1, abstract(make_state())), make_state(1))
        checkpointer.save(2, big, CONFIG)  # There is room again.
        assert_same(checkpointer.restore(2, abstract(big)), big)
    assert folders(tmp_path) == ["2"]
    assert not [
        record for record in caplog.records if record.exc_info
    ]  # No tracebacks of Orbax: the error has the cause.


BIG = {"w": jax.random.normal(jax.random.key(0), (256, 1024))}
LIMIT = 64 * 1024  # Maximum file size in bytes, which BIG exceeds.


def _ask_each_step(checkpointer):
    """The failure that `check_errors` returns within 20 s."""
    for _ in range(2000):
        failure = checkpointer.check_errors()
        if failure is not None:
            return failure
        time.sleep(0.01)
    raise AssertionError("no failure was reported")


@pytest.mark.parametrize("notice", ["check_errors", "save"])
def test_save_error_in_background(tmp_path, notice):
    """A save that failed in the background is reported once, and the next save makes up for it."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        with files_of_at_most(LIMIT):
            assert checkpointer.save(5, BIG, CONFIG) is None
            if notice == "check_errors":
                failure = _ask_each_step(checkpointer)
                assert (checkpointer.check_errors(), checkpointer.save(6, make_state(6), CONFIG)) == (None, None)
            else:
                failure = checkpointer.save(6, make_state(6), CONFIG)
        assert "step 5" in failure.what and "no checkpoint was written before" in failure.remedy
        checkpointer.wait()
        assert (checkpointer.steps(), checkpointer.check_errors()) == ([6], None)
        with files_of_at_most(LIMIT):
            checkpointer.save(7, BIG, CONFIG)
            assert "step 7" in _ask_each_step(checkpointer).what  # A first failure again.
            checkpointer.save(8, make_state(8), CONFIG)
    assert folders(tmp_path) == ["8"]


@pytest.mark.parametrize("notice", ["check_errors", "save", "wait"])
def test_save_when_it_failed_twice_in_a_row_then_raised(tmp_path, notice):
    with Checkpointer(tmp_path, keep=1) as checkpointer, files_of_at_most(LIMIT):
        checkpointer.save(5, BIG, CONFIG)
        assert "step 5" in _ask_each_step(checkpointer).what
        checkpointer.save(6, BIG, CONFIG)
        calls = {
            "check_errors": lambda: _ask_each_step(checkpointer),
            "save": lambda: checkpointer.save(7, make_state(), CONFIG),
            "wait": checkpointer.wait,
        }
        assert "step 6" in _failure_of(calls[notice]).what
    assert folders(tmp_path) == []


@pytest.mark.parametrize("notice", ["wait", "close"])
def test_last_save_error_raised_at_end(tmp_path, notice):
    """An error of the last save is raised at the end even if it was reported before."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    with files_of_at_most(LIMIT):
        checkpointer.save(5, BIG, CONFIG)
        assert "step 5" in _ask_each_step(checkpointer).what
    assert "step 5" in _failure_of(getattr(checkpointer, notice)).what
    checkpointer.close()
    assert folders(tmp_path) == []


def test_save_error_before_rewind(tmp_path):
    """A rewind after a failed save proceeds, and the failure is reported afterwards."""
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        with files_of_at_most(LIMIT):
            checkpointer.save(2, BIG, CONFIG)
            assert checkpointer.set_aside_newer(1, "rewound") == []
        assert_same(checkpointer.restore(1, abstract(make_state())), make_state(1))
        assert "step 2" in checkpointer.check_errors().what
        checkpointer.save(3, make_state(3), CONFIG)
    assert folders(tmp_path) == ["1", "3"]


def test_save_when_the_wall_clock_jumps(tmp_path, monkeypatch):
    """Saves ignore jumps of `time.time`, as by a time server or a resumed machine: here an hour a call."""
    hours, now = itertools.count(), time.time
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        monkeypatch.setattr(time, "time", lambda: now() + 3600 * next(hours))
        checkpointer.save(5, make_state(5), CONFIG)
        checkpointer.wait()
        monkeypatch.undo()
        assert next(hours) > 2 and checkpointer.steps() == [5]


def test_save_when_a_failed_one_still_writes(tmp_path):
    """A thread of a failed save that still writes, and recreates its folders as TensorStore does, does no harm."""
    ended = threading.Event()

    def write_on(folder):
        for number in itertools.count():
            if ended.is_set():
                return
            with contextlib.suppress(OSError):  # The folder is being deleted.
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(number)).write_bytes(b"late")

    with Checkpointer(tmp_path, keep=1) as checkpointer:
        with files_of_at_most(LIMIT):
            checkpointer.save(5, BIG, CONFIG)
            assert "step 5" in _ask_each_step(checkpointer).what
        [partial] = folders(tmp_path)
        writer = threading.Thread(target=write_on, args=(tmp_path / "checkpoints" / partial / "d",))
        writer.start()
        try:
            for step in (5, 6, 7):
                checkpointer.save(step, make_state(step), CONFIG)
                checkpointer.wait()
        finally:
            ended.set()
            writer.join()
    assert folders(tmp_path) == ["7"]


def _refusing(monkeypatch, times):
    """Lets Orbax fail to begin the first `times` saves; returns the list of requested folders."""
    begin, requested = checkpointer_module.ocp.AsyncCheckpointer.save, []

    def refuse(self, path, *args, **kwargs):
        requested.append(path.name)
        if len(requested) <= times:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return begin(self, path, *args, **kwargs)

    monkeypatch.setattr(checkpointer_module.ocp.AsyncCheckpointer, "save", refuse)
    return requested


def test_save_retry_if_it_cannot_begin(tmp_path, monkeypatch):
    """A save that cannot begin is tried again at once, and the error is reported."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        requested = _refusing(monkeypatch, times=1)
        assert "Input/output error" in str(checkpointer.save(5, make_state(5), CONFIG))
        checkpointer.wait()
        assert len(set(requested)) == 2, "threads may still write to the folder of the first"
        assert checkpointer.steps() == [5]


def test_save_when_it_cannot_begin_twice_then_raised(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        requested = _refusing(monkeypatch, times=2)
        assert "Input/output error" in str(_failure_of(lambda: checkpointer.save(5, make_state(5), CONFIG)))
        assert (len(requested), checkpointer.steps()) == (2, [])


@contextlib.contextmanager
def _undeletable(monkeypatch, pattern):
    """Makes folders of matching names undeletable, as on NFS while another process has a file in them open.

    The client then renames the file to `.nfs...` in its folder; unlinking it fails with EBUSY, and rmdir with ENOTEMPTY
    (Linux NFS FAQ, D2; nfs_unlink and nfs_sillyrename in fs/nfs/dir.c). `shutil.rmtree` raises the first.
    """
    kind = type(checkpointer_module.epath.Path("/"))
    rmtree = kind.rmtree

    def refuse(path, **options):
        if re.fullmatch(pattern, path.name):
            busy = path / "state/d/.nfs000000000001ab3c00000001"
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(busy))
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "rmtree", refuse)
        yield


@pytest.mark.parametrize("pattern", ["1.*-deleted-.*", r"4.*-saving-\w+\.orbax.*"])
def test_save_when_old_folders_cannot_be_deleted(tmp_path, monkeypatch, capsys, pattern):
    """Saving continues; each such folder is logged once, and deleted as soon as possible."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        checkpointer.wait()
        with _undeletable(monkeypatch, pattern):
            with files_of_at_most(LIMIT):
                checkpointer.save(4, BIG, CONFIG)
                assert "step 4" in _ask_each_step(checkpointer).what
            for step in (5, 6, 7):
                assert checkpointer.save(step, make_state(step), CONFIG) is None
                checkpointer.wait()
            assert checkpointer.check_errors() is None and checkpointer.steps() == [7]
        stderr = capsys.readouterr().err
        assert stderr.count("could not delete") == 1 and "Device or resource busy" in stderr and "(1 in all)" in stderr
        assert CheckpointReader(tmp_path).steps() == [7]
        assert len([name for name in folders(tmp_path) if "-hashes-" not in name]) == 2  # Step 7 is being hashed.
        checkpointer.save(8, make_state(8), CONFIG)
    assert folders(tmp_path) == ["8"]


def test_save_when_an_old_step_cannot_be_renamed(tmp_path, monkeypatch):
    """It remains a step, and is deleted later."""
    kind = type(checkpointer_module.epath.Path("/"))
    rename = kind.rename

    def refuse(path, target):  # As rename(2) without write permission on the step's folder.
        if path.name == "1":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path), None, str(target))
        return rename(path, target)

    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        checkpointer.wait()
        with monkeypatch.context() as patched:
            patched.setattr(kind, "rename", refuse)
            for step in (2, 3):
                checkpointer.save(step, make_state(step), CONFIG)
                checkpointer.wait()
            assert checkpointer.steps() == [1, 3]
        checkpointer.save(4, make_state(4), CONFIG)
    assert folders(tmp_path) == ["4"]


@pytest.mark.parametrize("instead", [None, "a file"])
def test_save_error_workdir_deleted(tmp_path, instead):
    """A save to a deleted workdir is a UserError, and the workdir is not created again."""
    checkpointer = Checkpointer(tmp_path / "run", keep=1)
    shutil.rmtree(tmp_path / "run")
    if instead:
        (tmp_path / "run").write_text(instead)
    error = _failure_of(lambda: checkpointer.save(1, make_state(), CONFIG))
    assert "step 1" in error.what and error.value == f"No such file or directory: {tmp_path}/run/checkpoints"
    checkpointer.close()
    assert not (tmp_path / "run").is_dir()


def test_workdir_when_it_cannot_be_made_then_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir cannot be made"):
        Checkpointer(tmp_path / "file" / "run", keep=1)


def test_save_error_step_exists(tmp_path):
    """A save of a step that exists already is a bug of ours and raises an AssertionError."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        with pytest.raises(AssertionError, match="step 1 is saved already"):
            checkpointer.save(1, make_state(2), CONFIG)
        assert_same(checkpointer.restore(1, abstract(make_state())), make_state(1))


def test_other_logs_of_absl_when_a_checkpointer_was_made_then_they_still_appear(tmp_path, caplog):
    Checkpointer(tmp_path, keep=1).close()
    with caplog.at_level(logging.ERROR, logger="absl"):
        logging.getLogger("absl").error("something else")
    assert "something else" in caplog.text


# --- checkpoint specs ------------------------------------------------------------------------------------------------


def test_spec_when_steps_were_evaluated_then_the_folder_alone_is_the_best(tmp_path):
    save_all(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0})
    assert parse_spec(str(tmp_path)) == (str(tmp_path), 20)
    assert parse_spec(tmp_path) == (str(tmp_path), 20)
    assert parse_spec(f"{tmp_path}:last") == (str(tmp_path), 30)
    assert parse_spec(f"{tmp_path}:10") == (str(tmp_path), 10)


def test_spec_when_none_was_evaluated_then_the_folder_alone_is_the_latest(tmp_path):
    save_all(tmp_path, {9: None, 10: None})
    assert parse_spec(str(tmp_path)) == (str(tmp_path), 10)


@pytest.mark.parametrize("name", ["run:7", "run:last", "a:b", "a:b/c"])
def test_spec_when_the_path_itself_has_a_colon_then_it_works(tmp_path, name):
    workdir = tmp_path / name
    save_all(workdir, {1: None, 7: None})
    assert parse_spec(str(workdir)) == (str(workdir), 7)
    assert parse_spec(f"{workdir}:1") == (str(workdir), 1)
    assert parse_spec(f"{workdir}:last") == (str(workdir), 7)


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("gs://bucket/run", ("gs://bucket/run", "best")),
        ("gs://bucket/run:20", ("gs://bucket/run", "20")),
        ("gs://bucket/run:last", ("gs://bucket/run", "last")),
    ],
)
def test_spec_when_it_is_in_a_bucket_then_its_scheme_is_no_step(spec, parts):
    assert checkpointer_module._split_spec(spec) == parts


def test_spec_error_missing_checkpoint(tmp_path):
    """A spec that names no checkpoint raises a UserError that says what exists instead."""
    save_all(tmp_path / "run", {10: None, 20: None})
    (tmp_path / "empty").mkdir()
    for spec, message in [
        (tmp_path / "none", "no such folder"),
        (f"{tmp_path}/none:3", "no such folder"),
        (f"{tmp_path}/run:lst", "no such folder.*WORKDIR:last"),
        (tmp_path / "empty", "no checkpoints"),
        (f"{tmp_path}/empty:5", "no checkpoints"),
        (f"{tmp_path}/run:15", "no such step: 15. Existing steps: 10, 20"),
        (f"{tmp_path}/run:{'9' * 5000}", "no such folder"),
        ("", "no such folder: ''"),
        ("http://nowhere/run", "no such kind of storage"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_spec(spec)


def test_meta_error_missing_step(tmp_path):
    """The UserError for the metadata of a missing step lists the steps that exist."""
    save_all(tmp_path, {10: None, 20: None})
    with pytest.raises(UserError, match=r"15\. Existing steps: 10, 20"):
        CheckpointReader(tmp_path).meta(15)


def test_state_bytes_when_summed_then_every_array_counts():
    assert state_bytes(abstract(make_state(size=16))) == 4 + 4 + 2 * (16 * 8 * 4 + 8 * 2)


def test_free_space_error_names_both_sizes(tmp_path, monkeypatch):
    """The UserError for a disk on which two checkpoints do not fit names the free and the needed space."""
    usage = functools.partial(shutil._ntuple_diskusage, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(5 * 2**30))
    check_free_space(tmp_path / "not" / "yet", 2**31)
    with pytest.raises(UserError, match=r"5\.0 GiB free, 6\.0 GiB needed"):
        check_free_space(tmp_path / "not" / "yet", 3 * 2**30)
    check_free_space("gs://bucket/run", 2**60)
