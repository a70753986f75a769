"""Hashes of a step: computed after it counts, completed by the next start, and never in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from aimv2_jax.checkpoint import layout, manifest
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.checkpoint.metadata import DamagedStep
from tests.checkpoint.test_damage import data_file, flip_a_bit
from tests.helpers.checkpoints import CONFIG, abstract, assert_same, folders, make_state, save_all

ROOT = Path(__file__).parents[2]
UNHASHED = "the checkpoint of step {} has no hashes yet, so only names and sizes of its files are verified\n"


@pytest.fixture
def held(monkeypatch):
    """Holds all hashing at its beginning, until `go_on` is set."""
    hash_files, held = manifest.hash_files, threading.Event()
    held.go_on = threading.Event()

    def wait(*args):
        held.set()
        assert held.go_on.wait(60)
        return hash_files(*args)

    monkeypatch.setattr(manifest, "hash_files", wait)
    yield held
    held.go_on.set()


def hashed(workdir):
    return sorted(int(path.parent.name) for path in (Path(workdir) / "checkpoints").glob("*/hashes.json"))


def test_step_counts_before_it_is_hashed(tmp_path, held, capsys):
    """A step can be restored, by sizes and with a line about it, while it is hashed; then it has hashes."""
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        checkpointer.wait()
        assert held.wait(60) and checkpointer.steps() == CheckpointReader(tmp_path).steps() == [1]
        assert_same(CheckpointReader(tmp_path).restore(1, abstract(make_state())), make_state(1))
        assert capsys.readouterr().err == UNHASHED.format(1) and hashed(tmp_path) == []
        held.go_on.set()
    assert hashed(tmp_path) == [1]
    CheckpointReader(tmp_path).verify(1)
    assert capsys.readouterr().err == ""


def test_step_deleted_while_it_is_hashed(tmp_path, held, capsys):
    """A step that is deleted or set aside while it is hashed leaves no error and no file."""
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), CONFIG)
        checkpointer.wait()
        assert held.wait(60)
        checkpointer.set_aside_newer(2, "rewound")
        checkpointer.save(3, make_state(4), CONFIG)
        checkpointer.wait()
        held.go_on.set()
    assert folders(tmp_path) == ["3", "rewound-3-1"] and hashed(tmp_path) == [3]
    assert capsys.readouterr().err == ""


def test_stop_hashing(tmp_path, held, capsys):
    """After `stop_hashing` the end does not wait for hashes; the next start computes them."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, make_state(1), CONFIG)
    checkpointer.save(2, make_state(2), CONFIG)
    checkpointer.wait()
    assert held.wait(60)
    checkpointer.stop_hashing()
    held.go_on.set()
    checkpointer.close()
    assert hashed(tmp_path) == [] and folders(tmp_path) == ["1", "2"]
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (2, [])
    assert hashed(tmp_path) == [1, 2]
    assert capsys.readouterr().err == UNHASHED.format(2)


KILLED_BEFORE_THE_HASHES = """
import os, signal, sys
from tests.helpers import checkpoints as test
from aimv2_jax.checkpoint import layout, manifest

with test.Checkpointer(sys.argv[1], keep=2) as checkpointer:
    manifest.hash_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpointer.save(1, test.make_state(1), test.CONFIG)
    checkpointer.wait()
"""


def test_kill_between_commit_and_hashes(tmp_path, capsys):
    """The step is there; its sizes are verified; the next start hashes it, and then any changed bit is detected."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KILLED_BEFORE_THE_HASHES}"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    assert (folders(tmp_path), hashed(tmp_path)) == (["1"], [])
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (1, [])
        assert_same(checkpointer.restore(1, abstract(make_state())), make_state(1))
    assert capsys.readouterr().err == UNHASHED.format(1) and hashed(tmp_path) == [1]
    flip_a_bit(data_file(tmp_path, 1))
    with pytest.raises(DamagedStep, match="other contents"):
        CheckpointReader(tmp_path).restore(1, abstract(make_state()))


def test_unhashed_step_of_other_size(tmp_path):
    """A file of another size is damage without hashes, too."""
    save_all(tmp_path, {1: None})
    (tmp_path / "checkpoints/1/hashes.json").unlink()
    os.truncate(data_file(tmp_path, 1), 10)
    with pytest.raises(DamagedStep, match="size 10 instead of"):
        CheckpointReader(tmp_path).verify(1)


def test_hashes_when_they_cannot_be_written(tmp_path, monkeypatch, capsys):
    """A step whose hashes cannot be written is saved all the same; one line says so."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path, keep=2) as checkpointer:
        monkeypatch.setattr(layout, "commit_hashes", full)
        checkpointer.save(1, make_state(1), CONFIG)
    line = "the checkpoint of step 1 is saved and not hashed (No space left on device); the next start hashes it\n"
    assert capsys.readouterr().err == line and CheckpointReader(tmp_path).steps() == [1]


def test_step_while_its_hashes_are_written(tmp_path, monkeypatch):
    """Half-written hashes are no part of the step, and are deleted by the next start."""

    def verify_and_fail(part, target):
        CheckpointReader(tmp_path).verify(1)
        verified.append(shutil.copy(part, tmp_path))
        raise OSError(5, "Input/output error")

    verified = []
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        monkeypatch.setattr(layout, "atomic_move", verify_and_fail)
        checkpointer.save(1, make_state(1), CONFIG)
    assert len(verified) == 1 and folders(tmp_path) == ["1"]
    shutil.move(verified[0], tmp_path / "checkpoints")  # As after a kill.
    Checkpointer(tmp_path, keep=2).close()
    assert folders(tmp_path) == ["1"]


def test_unhashed_step_of_other_contents(tmp_path):
    """Contents that cannot be restored are damage, whichever file has them and whatever Orbax raises."""
    arrays = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(3)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, arrays, CONFIG)
    (tmp_path / "checkpoints/1/hashes.json").unlink()
    files = [file for file in (tmp_path / "checkpoints/1/state").rglob("d/*") if file.stat().st_size > 4096]
    for file in files:
        data = file.read_bytes()
        file.write_bytes(bytes(len(data)))
        with pytest.raises(DamagedStep, match="state: "):
            CheckpointReader(tmp_path).restore(1, abstract(arrays))
        file.write_bytes(data)
    assert files


def test_sweep_while_hashes_are_written(tmp_path, monkeypatch):
    """The sweep before a save does not delete hashes that are being written."""
    atomic_move = layout.atomic_move

    def sweep_and_move(part, target):
        sweep = threading.Thread(target=checkpointer._sweep)
        sweep.start()
        sweep.join(0.2)  # It waits for the hashes, so it ends later.
        atomic_move(part, target)

    monkeypatch.setattr(layout, "atomic_move", sweep_and_move)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
    assert hashed(tmp_path) == [1]
