"""Append-only files: written at once on a disk, soon in a bucket, and complete after a flush."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from aimv2_jax.errors import StorageError, UserError
from aimv2_jax.storage import append
from aimv2_jax.storage.append import AppendFile
from aimv2_jax.storage.files import atomic_write, exists, read_bytes
from tests.helpers.failing_bucket import fail, succeed


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


def test_bucket_file_flush_or_close(gcs_folder):
    """A flush or close uploads all written bytes to the bucket, after the earlier contents of the file."""
    url = f"{gcs_folder}/file"
    atomic_write(url, b"zero\n")
    file = AppendFile(url)
    for number in range(3):
        file.write(b"%d\n" % number)
    file.flush()
    assert read_bytes(url) == b"zero\n0\n1\n2\n"
    file.write(b"last\n")
    file.close()
    assert read_bytes(url) == b"zero\n0\n1\n2\nlast\n"


def test_bucket_file_without_flush(gcs_folder, monkeypatch):
    """Bytes written to a file in a bucket are uploaded soon even without a flush."""
    monkeypatch.setattr(append, "_UPLOAD_INTERVAL_S", 0.05)
    file = AppendFile(f"{gcs_folder}/file")
    file.write(b"one\n")
    deadline_s = time.monotonic() + 10
    while not exists(f"{gcs_folder}/file"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert read_bytes(f"{gcs_folder}/file") == b"one\n"
    file.close()


@pytest.mark.parametrize("kind, error", [("503", StorageError), ("403", UserError)])
def test_bucket_file_upload_error(failing_gcs, kind, error):
    """If the bucket fails for long, flush raises an error that tells whether to wait, and nothing is lost."""
    url = f"{failing_gcs.new_folder()}/file"
    file = AppendFile(url)
    file.write(b"one\n")
    fail(failing_gcs, kind)
    with pytest.raises(error, match="file cannot be written"), append.writing(file._path):
        file.flush()
    succeed(failing_gcs)
    file.close()
    assert read_bytes(url) == b"one\n"


def test_bucket_file_when_it_cannot_be_read(failing_gcs):
    """A file whose earlier contents cannot be read is not begun anew."""
    url = f"{failing_gcs.new_folder()}/file"
    atomic_write(url, b"one\n")
    fail(failing_gcs, "404", "503", only="GET")
    file = AppendFile(url)
    with pytest.raises(StorageError), append.writing(file._path):
        file.write(b"two\n")
    succeed(failing_gcs)
    file.write(b"three\n")
    file.close()
    assert read_bytes(url) == b"one\nthree\n"
