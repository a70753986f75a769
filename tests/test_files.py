"""Files and locks: whole or absent, and held by one."""

import multiprocessing
import os

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.files import part_of, write_whole
from aimv2_jax.locks import claimed


def test_file_when_written_then_there_or_replaced_and_nothing_beside_it(tmp_path):
    file = tmp_path / "some.json"
    for data in (b"old", b"new"):
        write_whole(file, data)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"some.json": data}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_file_when_the_disk_refuses_midway_then_the_old_one_stays_and_nothing_beside_it(tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "some.json"
    write_whole(file, b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"some.json": b"old"}


def test_part_when_two_hosts_have_a_process_of_one_number_then_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {part_of(tmp_path / "a").name for _ in range(100)}
    assert len(names) == 100 and all(name.startswith(".a.") and name.endswith(".part") for name in names)


def _hold(file, held, end):
    with claimed(file, "--output", file.parent):
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
        claimed(tmp_path / "lock", "--output", "x"),
    ):
        pass
    process.kill()
    process.join(30)
    with claimed(tmp_path / "lock", "--output", "x"):
        pass
