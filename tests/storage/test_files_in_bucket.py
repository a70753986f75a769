"""Files in a bucket: what may be transient is retried and counted, and listings decide what exists."""

from __future__ import annotations

import errno

import pytest

from aimv2_jax.errors import EXIT_RETRY, EXIT_USER, describe_exit
from aimv2_jax.storage.bucket import file_system
from aimv2_jax.storage.files import (
    atomic_move,
    atomic_write,
    exists,
    is_temporary,
    list_names,
    list_objects,
    read_bytes,
    remove,
)
from aimv2_jax.storage.retries import STORAGE_RETRIES
from tests.helpers.failing_bucket import fail, succeed


def test_bucket_files_come_and_go(gcs_folder, tmp_path):
    """Objects are written, replaced, read, listed, moved there and deleted, alone or with all below a folder."""
    assert list_names(gcs_folder) == [] and not exists(f"{gcs_folder}/a")
    for name, data in {"a": b"old", "ab": b"", "sub/deep/c": b"c" * 5000}.items():
        atomic_write(f"{gcs_folder}/{name}", data)
    atomic_write(f"{gcs_folder}/a", b"new")
    (tmp_path / "part").write_bytes(b"moved")
    atomic_move(tmp_path / "part", f"{gcs_folder}/sub/d")
    assert list_objects(gcs_folder) == {"a": 3, "ab": 0, "sub/d": 5, "sub/deep/c": 5000}
    assert list_names(gcs_folder) == ["a", "ab", "sub"] and not (tmp_path / "part").exists()
    assert [read_bytes(f"{gcs_folder}/{name}") for name in ("a", "ab", "sub/d")] == [b"new", b"", b"moved"]
    assert exists(f"{gcs_folder}/sub") and not exists(f"{gcs_folder}/su")
    for name in ("a", "sub", "nothing"):
        remove(f"{gcs_folder}/{name}")
    assert list_objects(gcs_folder) == {"ab": 0}


@pytest.mark.parametrize("kind", ["403", "429", "503", "reset", "cut", "short", "slow"])
def test_bucket_files_when_any_request_fails_once(failing_gcs, kind):
    """One failure of any request changes nothing; those that gcsfs does not retry are counted."""
    folder = failing_gcs.new_folder()
    for number, call in enumerate(
        [
            lambda: atomic_write(f"{folder}/file", b"data"),
            lambda: read_bytes(f"{folder}/file"),
            lambda: list_objects(folder),
            lambda: exists(f"{folder}/file"),
            lambda: remove(f"{folder}/file"),
        ]
    ):
        fail(failing_gcs, kind, limit=1)
        failed = failing_gcs.counts()["failures"].get(kind, 0)
        STORAGE_RETRIES.take()
        assert call() == [None, b"data", {"file": 4}, True, None][number]
        assert STORAGE_RETRIES.take() == (kind == "403")
        assert failing_gcs.counts()["failures"][kind] == failed + 1
    succeed(failing_gcs)
    assert list_objects(folder) == {}


def test_bucket_read_of_listed_object(failing_gcs):
    """An object that is listed and not found is read again; if it stays so, the bucket fails, and is not empty."""
    url = f"{failing_gcs.new_folder()}/file"
    atomic_write(url, b"data")
    fail(failing_gcs, "404", limit=2)
    STORAGE_RETRIES.take()
    assert read_bytes(url) == b"data" and STORAGE_RETRIES.take() == 2
    fail(failing_gcs, "404")
    with pytest.raises(OSError) as caught:
        read_bytes(url)
    assert caught.value.errno == errno.EAGAIN and is_temporary(caught.value)
    code, line = describe_exit(caught.value)
    assert code == EXIT_RETRY and url in line


def test_bucket_read_of_absent_object(gcs_folder):
    """An object that is not listed is absent, at once."""
    STORAGE_RETRIES.take()
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{gcs_folder}/none")
    assert STORAGE_RETRIES.take() == 0


def test_bucket_refuses_for_good(failing_gcs):
    """A bucket that refuses access is the user's to fix, after some attempts."""
    url = f"{failing_gcs.new_folder()}/file"
    fail(failing_gcs, "403")
    STORAGE_RETRIES.take()
    for call in (lambda: read_bytes(url), lambda: atomic_write(url, b""), lambda: list_names(url), lambda: remove(url)):
        with pytest.raises(PermissionError) as caught:
            call()
        assert not is_temporary(caught.value) and describe_exit(caught.value)[0] == EXIT_USER
    assert STORAGE_RETRIES.take() == 28


def test_bucket_keeps_what_it_should_delete(gcs_folder, monkeypatch):
    """An object that is still listed after its deletion counts as not deleted."""
    url = f"{gcs_folder}/file"
    atomic_write(url, b"data")
    monkeypatch.setattr(type(file_system(url)), "rm", lambda *_: None)
    with pytest.raises(OSError) as caught:
        remove(url)
    assert is_temporary(caught.value) and exists(url)
