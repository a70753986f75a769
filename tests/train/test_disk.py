"""Disks that refuse: full, read-only, without permission, gone. One sentence each, and no good step is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import abstract, assert_same, folders, make_state, save_all

from aimv2_jax.train.checkpoint import CheckpointReader

ROOT = Path(__file__).parents[2]
# Root may do everything; without these it may do what the folders' owner may.
AS_OWNER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

# Each script goes on with a run that has step 1, and shows what the user is told.
GO_ON = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import os
import shutil
import jax
import checkpoints as test
from aimv2_jax.errors import reports_user_errors
BIG = {{"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}

@reports_user_errors
def main():
    with test.Checkpointer({workdir!r}, keep=1) as checkpointer:
        assert checkpointer.newest_intact() == (1, [])
        {within}
        failure = checkpointer.save(2, BIG, test.CONFIG)
        while failure is None:
            failure = checkpointer.check_errors()
        print("first:", failure)
        checkpointer.save(3, BIG, test.CONFIG)
    return 0

sys.exit(main())
"""


def go_on(workdir: Path, *wrapper: str, within: str = "pass") -> subprocess.CompletedProcess:
    """A process that goes on with the run, started by `wrapper`; `within` it, something happens before its saves."""
    script = GO_ON.format(root=str(ROOT), tests=str(ROOT / "tests"), workdir=str(workdir), within=within)
    command = [*wrapper, sys.executable, "-c", script]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=ROOT)


def mounted(mount: str) -> list[str]:
    """Starts a process to which disks are mounted that no other sees."""
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{mount} && exec "$0" "$@"']


def can_mount() -> bool:
    tried = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(tried, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a disk of its own")


def assert_told(done: subprocess.CompletedProcess, *words: str) -> None:
    """It ended by one line with those words, and code 2."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def run(tmp_path):
    save_all(tmp_path / "run", {1: None})
    return tmp_path / "run"


def assert_nothing_lost(run: Path) -> None:
    assert CheckpointReader(run).verify(1)
    assert_same(CheckpointReader(run).restore(1, abstract(make_state())), make_state(1))


@needs_mounts
def test_disk_when_full_then_told_twice_with_the_room_and_the_good_step_stays(run):
    # A disk of its own of 3 MiB, with the run on it; what is left there is copied back.
    here, kept = str(run), str(run.with_name("kept"))
    mount = f"cp -r {here} {kept} && mount -t tmpfs -o size=3m tmpfs {here} && cp -r {kept}/. {here}/ && rm -r {kept}"
    done = go_on(run, *mounted(mount), within=f"import atexit; atexit.register(shutil.copytree, {here!r}, {kept!r})")
    assert_told(done, "could not write the checkpoint of step 3, which needs 4.0 MiB (", "No space left on device")
    assert "first: could not write the checkpoint of step 2" in done.stdout
    assert "the last good one, step 1, is untouched" in done.stderr
    assert folders(run.with_name("kept")) == ["1"]
    assert_nothing_lost(run.with_name("kept"))


@needs_mounts
def test_disk_when_it_becomes_read_only_then_told_and_the_good_step_stays(run):
    mount = f"mount --bind {run} {run}"
    read_only = f"import subprocess; subprocess.run(['mount', '-o', 'remount,bind,ro', {str(run)!r}], check=True)"
    done = go_on(run, *mounted(mount), within=read_only)
    assert_told(done, "could not write the checkpoint of step 2", "Read-only file system")
    assert_nothing_lost(run)


def test_folder_when_it_may_not_be_written_then_told_and_the_good_step_stays(run):
    place = run / "checkpoints"
    place.chmod(0o555)
    try:
        done = go_on(run, *AS_OWNER)
    finally:
        place.chmod(0o755)
    assert_told(done, "could not write the checkpoint of step 2", "Permission denied")
    assert folders(run) == ["1"]
    assert_nothing_lost(run)


def test_folder_when_it_may_not_be_read_then_one_sentence(run):
    place = run / "checkpoints"
    place.chmod(0o000)
    try:
        done = go_on(run, *AS_OWNER)
    finally:
        place.chmod(0o755)
    assert_told(done, "Permission denied", str(place))
    assert_nothing_lost(run)


def test_workdir_when_it_vanishes_then_told_and_not_made_anew(run):
    done = go_on(run, within=f"os.rename({str(run)!r}, {str(run) + '-elsewhere'!r})")
    assert_told(done, "could not write the checkpoint of step 2", f"No such file or directory: {run}/checkpoints")
    assert not run.exists()
    assert_nothing_lost(run.with_name("run-elsewhere"))
