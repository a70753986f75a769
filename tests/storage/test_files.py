"""Atomic files, exclusive locks and leases, and checks of folders from the command line."""

import errno
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.storage import leases
from aimv2_jax.storage.files import atomic_write, check_folder, is_made_by_system, make_folder, part_path
from aimv2_jax.storage.locks import lock_folder


def test_atomic_write_creates_or_replaces(tmp_path):
    """A written file is new or replaces the old one, and nothing is left beside it."""
    file = tmp_path / "some.json"
    for data in (b"old", b"new"):
        atomic_write(file, data)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"some.json": data}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_disk_error(tmp_path, monkeypatch, call):
    """A disk error midway leaves the old file and nothing beside it."""

    def refuse(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "some.json"
    atomic_write(file, b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space"):
        atomic_write(file, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"some.json": b"old"}


def test_part_when_two_hosts_have_a_process_of_one_number_then_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {part_path(tmp_path / "a").name for _ in range(100)}
    assert len(names) == 100 and all(name.startswith(".a.") and name.endswith(".part") for name in names)


def _hold(file, held, end):
    with lock_folder(file, "--output", file.parent):
        held.set()
        end.wait(30)


def test_lock_when_another_process_holds_it_then_refused_until_that_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held, end))
    process.start()
    assert held.wait(30)
    with (
        pytest.raises(UserError, match="--output is in use by another run"),
        lock_folder(tmp_path / "lock", "--output", "x"),
    ):
        pass
    process.kill()
    process.join(30)
    with lock_folder(tmp_path / "lock", "--output", "x"):
        pass


def test_lock_when_it_is_a_link_then_its_target_stays(tmp_path):
    (tmp_path / "victim").write_text("dear")
    (tmp_path / "lock").symlink_to("victim")
    with (
        pytest.raises(UserError, match=r"is a symbolic link: '.*/lock'"),
        lock_folder(tmp_path / "lock", "", ""),
    ):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("dear")
    with lock_folder(tmp_path / "lock", "--workdir", tmp_path):
        assert [(tmp_path / name).read_text() for name in ("lock", "victim")] == ["dear", "dear"]


# --- where the file system has no locks ----------------------------------------------------------------------------


def _without_locks(number):
    """Replaces flock by that of file systems without locks, and shortens the times of leases.

    ENOSYS: Lustre unless mounted with -o flock (mount.lustre(8); ll_file_noflock in its llite/file.c). ENOLCK: NFS
    whose lock daemon is not reached (flock(2), nlmclnt_proc in the kernel). EOPNOTSUPP: file servers of FUSE.
    """

    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    fcntl.flock = refuse
    leases._RENEW_INTERVAL_S, leases._EXPIRES_AFTER_S = 0.1, 1.0


def _hold_without_locks(file, number, held, end):
    _without_locks(number)
    _hold(file, held, end)


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds `lock` by a lease, in a test without locks."""
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    monkeypatch.setattr(leases, "_RENEW_INTERVAL_S", 0.1)
    monkeypatch.setattr(leases, "_EXPIRES_AFTER_S", 1.0)
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold_without_locks, args=(tmp_path / "lock", errno.ENOSYS, held, end))
    process.start()
    assert held.wait(30)
    _without_locks(errno.ENOSYS)
    process.end = end
    yield process
    process.kill()
    process.join(30)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_when_the_disk_has_none(tmp_path, number, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    monkeypatch.setattr(leases, "_RENEW_INTERVAL_S", 0.1)
    _without_locks(number)
    with lock_folder(tmp_path / "lock", "--workdir", tmp_path):
        assert os.strerror(number) in capsys.readouterr().err
        assert json.loads((tmp_path / "lock.lease").read_bytes())["process"] == os.getpid()
    assert not (tmp_path / "lock.lease").exists()


def test_lock_without_locks_when_another_run_lives(tmp_path, holder):
    """The lock is refused while that run renews its lease, and granted at once after that run ends normally."""
    with (
        pytest.raises(UserError, match=rf"--workdir is in use by another run: .* by process {holder.pid} on "),
        lock_folder(tmp_path / "lock", "--workdir", "x"),
    ):
        pass
    holder.end.set()
    holder.join(30)
    assert holder.exitcode == 0
    begin_s = time.monotonic()
    with lock_folder(tmp_path / "lock", "--workdir", "x"):
        assert time.monotonic() - begin_s < leases._EXPIRES_AFTER_S


def test_lock_without_locks_when_another_was_killed(tmp_path, holder):
    holder.kill()
    holder.join(30)
    begin_s = time.monotonic()
    with lock_folder(tmp_path / "lock", "--workdir", "x"):
        assert time.monotonic() - begin_s >= leases._EXPIRES_AFTER_S


def test_lease_when_another_took_it_then_its_run_ends(tmp_path, holder):
    """A run that was suspended for longer than the timeout must not write any more."""
    (tmp_path / "lock.lease").write_bytes(b'{"host": "elsewhere", "process": 1}')
    holder.join(30)
    assert holder.exitcode == 2
    assert b"elsewhere" in (tmp_path / "lock.lease").read_bytes()


# --- folders -------------------------------------------------------------------------------------------------------


def _names(folder: Path, case: str) -> Path:
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "self").symlink_to("self")
    return {
        "a file": folder / "file",
        "below a file": folder / "file/x/y",
        "dangling": folder / "dangling",
        "below dangling": folder / "dangling/x",
        "self": folder / "self",
        "long": folder / "/".join("x" * 2000),
    }[case]


@pytest.mark.parametrize("case", ["a file", "below a file", "dangling", "below dangling", "self", "long"])
def test_folder_error_cannot_be_created(tmp_path, case):
    """A folder that cannot be created is a UserError that names the flag."""
    for call in (check_folder, make_folder):
        with pytest.raises(UserError, match=r"^--workdir "):
            call(_names(tmp_path, case), "--workdir")
        for path in tmp_path.iterdir():
            path.unlink()


def test_folder_error_system_refuses():
    """A folder in a place where the system creates none is a UserError."""
    check_folder("/proc/x", "--workdir")
    with pytest.raises(UserError, match=r"--workdir cannot be made: .*\(/proc/x\)"):
        make_folder("/proc/x", "--workdir")


def test_folder_when_deep_or_by_a_link_then_made(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    deep = tmp_path / "link" / "/".join("x" * 1500)
    for _ in range(2):
        check_folder(deep, "--workdir")
        make_folder(deep, "--workdir")
    assert deep.is_dir()
    check_folder("gs://bucket/" + "x" * 5000, "--workdir")


def test_folder_that_appears_while_it_is_checked(tmp_path, monkeypatch):
    """Another process may make it between two looks; it is a folder all the same."""
    new = tmp_path / "new"

    def make_after(look):
        def look_and_make(path):
            found = look(path)
            if os.fspath(path) == str(new) and not found:
                os.mkdir(new)
            return found

        return look_and_make

    for name in ("isdir", "lexists"):
        monkeypatch.setattr(os.path, name, make_after(getattr(os.path, name)))
    check_folder(new, "--workdir")
    assert new.is_dir()


@pytest.mark.parametrize("name", [".DS_Store", "._x", ".nfs00000000000af3c200000004", "Thumbs.db", "desktop.ini"])
def test_name_when_a_system_made_it(name):
    assert is_made_by_system(name)
    assert not any(map(is_made_by_system, (f"a{name}", name[1:], "manifest.json", "0", "state", ".nfs", "_METADATA")))
