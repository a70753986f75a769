"""Disk errors: full, read-only, no permission, gone. Each gives one message, and no good step is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from tests.helpers.checkpoints import abstract, assert_same, folders, make_state, save_all

ROOT = Path(__file__).parents[2]
# Root without these capabilities has only the permissions of the folders' owner.
AS_OWNER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

# The script continues a run that has step 1, and prints the errors.
GO_ON = """
import sys
sys.path.insert(0, {root!r})
import os
import shutil
import jax
from tests.helpers import checkpoints as test
from aimv2_jax.errors import cli_main
BIG = {{"w": jax.random.normal(jax.random.key(0), (1024, 1024))}}

@cli_main
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
    """Continues the run in a process started by `wrapper`; `within` is code that it runs before its saves."""
    script = GO_ON.format(root=str(ROOT), workdir=str(workdir), within=within)
    command = [*wrapper, sys.executable, "-c", script]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=ROOT)


def go_on_with_mode(workdir: Path, mode: int) -> subprocess.CompletedProcess:
    """Continues the run as an ordinary user while the folder of its checkpoints has `mode`."""
    checkpoints = workdir / "checkpoints"
    checkpoints.chmod(mode)
    try:
        return go_on(workdir, *AS_OWNER)
    finally:
        checkpoints.chmod(0o755)


def mounted(mount: str) -> list[str]:
    """Command prefix that starts a process with private mounts."""
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{mount} && exec "$0" "$@"']


def can_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this machine allows no private mounts")


def assert_user_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Checks that the process ended with code 2 and one line with these words."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def run(tmp_path):
    save_all(tmp_path / "run", {1: None})
    return tmp_path / "run"


def assert_nothing_lost(run: Path) -> None:
    CheckpointReader(run).verify(1)  # Raises if it is damaged.
    assert_same(CheckpointReader(run).restore(1, abstract(make_state())), make_state(1))


@needs_mounts
def test_save_error_disk_full(run):
    """A full disk is reported twice with the needed and the free space, and the last good step stays."""
    # The run is on a private disk of 3 MiB; its contents are copied back.
    here, kept = str(run), str(run.with_name("kept"))
    mount = f"cp -r {here} {kept} && mount -t tmpfs -o size=3m tmpfs {here} && cp -r {kept}/. {here}/ && rm -r {kept}"
    done = go_on(run, *mounted(mount), within=f"import atexit; atexit.register(shutil.copytree, {here!r}, {kept!r})")
    assert_user_error(
        done, "could not write the checkpoint of step 3, which needs 4.0 MiB (", "No space left on device"
    )
    assert "first: could not write the checkpoint of step 2" in done.stdout
    assert "the last good one, step 1, is untouched" in done.stderr
    assert folders(run.with_name("kept")) == ["1"]
    assert_nothing_lost(run.with_name("kept"))


@needs_mounts
def test_save_error_disk_becomes_read_only(run):
    """A disk that becomes read-only is reported, and the last good step stays."""
    mount = f"mount --bind {run} {run}"
    read_only = f"import subprocess; subprocess.run(['mount', '-o', 'remount,bind,ro', {str(run)!r}], check=True)"
    done = go_on(run, *mounted(mount), within=read_only)
    assert_user_error(done, "could not write the checkpoint of step 2", "Read-only file system")
    assert_nothing_lost(run)


def test_save_error_folder_not_writable(run):
    """A folder without write permission is reported, and the last good step stays."""
    done = go_on_with_mode(run, 0o555)
    assert_user_error(done, "could not write the checkpoint of step 2", "Permission denied")
    assert folders(run) == ["1"]
    assert_nothing_lost(run)


def test_folder_when_it_may_not_be_read_then_one_sentence(run):
    done = go_on_with_mode(run, 0o000)
    assert_user_error(done, "Permission denied", str(run / "checkpoints"))
    assert_nothing_lost(run)


def test_save_error_workdir_renamed(run):
    """A workdir that vanishes during the run is reported and not created again."""
    done = go_on(run, within=f"os.rename({str(run)!r}, {str(run) + '-elsewhere'!r})")
    assert_user_error(done, "could not write the checkpoint of step 2", f"No such file or directory: {run}/checkpoints")
    assert not run.exists()
    assert_nothing_lost(run.with_name("run-elsewhere"))
