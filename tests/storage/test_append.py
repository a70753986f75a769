"""Append-only files: written at once on a disk, soon in a bucket, and complete after a flush."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.storage import append
from aimv2_jax.storage.append import AppendFile
from tests.helpers.bucket import NAME, stand_in


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return stand_in(tmp_path / "bucket", monkeypatch)


def test_local_file_append(tmp_path):
    """Bytes written to a local file are on disk at once, after its earlier contents."""
    path = tmp_path / "folder/file"
    file = AppendFile(path)
    assert not path.parent.exists()
    file.write(b"one\n")
    assert path.read_bytes() == b"one\n"
    file.close()
    file.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    file.close()


def test_file_when_deleted_meanwhile_then_made_again(tmp_path):
    file = AppendFile(tmp_path / "folder/file")
    file.write(b"one\n")
    (tmp_path / "folder/file").unlink()
    file.write(b"two\n")
    assert (tmp_path / "folder/file").read_bytes() == b"two\n"
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(UserError, match=r"file cannot be written: 'No such file"), append.writing(file._path):
        file.write(b"three\n")
    assert not (tmp_path / "folder").exists()
    file.close()


def test_file_when_a_link_or_a_pipe_then_refused(tmp_path):
    (tmp_path / "victim").write_text("dear")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(UserError, match=f"is not a regular file: '.*/{name}'"):
            AppendFile(tmp_path / name).write(b"one\n")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="is not a regular file"):
        AppendFile(tmp_path / "pipe").write(b"one\n")
    os.close(reader)
    assert (tmp_path / "victim").read_text() == "dear"


def test_bucket_file_flush_or_close(bucket):
    """A flush or close uploads all written bytes to the bucket, after the earlier contents of the file."""
    (bucket / "folder").mkdir()
    (bucket / "folder/file").write_bytes(b"zero\n")
    file = AppendFile(f"{NAME}/folder/file")
    for number in range(3):
        file.write(b"%d\n" % number)
    file.flush()
    assert (bucket / "folder/file").read_bytes() == b"zero\n0\n1\n2\n"
    file.write(b"last\n")
    file.close()
    assert (bucket / "folder/file").read_bytes() == b"zero\n0\n1\n2\nlast\n"


def test_bucket_file_without_flush(bucket, monkeypatch):
    """Bytes written to a file in a bucket are uploaded soon even without a flush."""
    monkeypatch.setattr(append, "_UPLOAD_INTERVAL_S", 0.05)
    file = AppendFile(f"{NAME}/file")
    file.write(b"one\n")
    deadline_s = time.monotonic() + 10
    while not (bucket / "file").exists() or (bucket / "file").read_bytes() != b"one\n":
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    file.close()


def test_bucket_file_upload_error(bucket, monkeypatch):
    """If the bucket refuses an upload once, flush raises the error and no bytes are lost."""
    atomic_write = append.atomic_write

    def refuse(path, data):
        raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(append, "atomic_write", refuse)
    file = AppendFile(f"{NAME}/file")
    file.write(b"one\n")
    with pytest.raises(RuntimeError, match="503"):
        file.flush()
    monkeypatch.setattr(append, "atomic_write", atomic_write)
    file.close()
    assert (bucket / "file").read_bytes() == b"one\n"
