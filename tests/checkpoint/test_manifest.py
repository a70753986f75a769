"""The manifest: any changed byte of a folder, or of the manifest itself, is detected and named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading

import pytest
from etils import epath

from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.manifest import FileProblem, Hashes, Manifest

HEADER = {"format_version": 2, "step": 7, "versions": {"python": "3.11"}, "leaves": {"params/ä": "float32[2]"}}
FILES = {"meta/metadata": b"{}", "state/d/one": bytes(range(256)) * 8, "state/d/two": b"two", "state/empty": b""}


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    sign(epath.Path(tmp_path))
    return epath.Path(tmp_path)


def sign(folder) -> Manifest:
    """Writes the manifest and the hashes of the current files."""
    written = manifest.write(folder, HEADER)
    hashes = manifest.make_hashes(written, manifest.hash_files(folder, written.sizes))
    (folder / manifest.HASHES).write_bytes(hashes.to_bytes())
    return written


def compare(folder, progress=None):
    known = manifest.read(folder)
    return manifest.compare(folder, known, manifest.read_hashes(folder, known), progress)


def test_manifest_written_and_read(folder):
    """Manifest and hashes have every file, and come back as they were written."""
    written = manifest.read(folder)
    assert written.header == HEADER and written.num_bytes == 2 + 2048 + 3
    assert written.sizes == {name: len(data) for name, data in FILES.items()}
    hashes = manifest.read_hashes(folder, written)
    assert hashes.files == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert compare(folder) == []
    assert json.loads((folder / "manifest.json").read_text())["step"] == 7


@pytest.mark.parametrize("name", ["manifest.json", "hashes.json"])
def test_manifest_any_bit_flipped(folder, name):
    """Any flipped bit of the manifest or of the hashes is detected."""
    data, known = (folder / name).read_bytes(), manifest.read(folder)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="other contents"):
            if name == "manifest.json":
                Manifest.from_bytes(bytes(flipped))
            else:
                Hashes.from_bytes(bytes(flipped), known)


def test_hashes_of_another_manifest(folder):
    """Hashes count only for the manifest for which they were written."""
    other = Manifest({**HEADER, "step": 8}, manifest.read(folder).sizes)
    with pytest.raises(ValueError, match="that of another manifest"):
        manifest.read_hashes(folder, other)


def test_compare_without_hashes(folder):
    """Without hashes, names and sizes are compared, and contents are not."""
    known = manifest.read(folder)
    (folder / "state/d/two").write_bytes(b"TWO")
    assert manifest.compare(folder, known, None) == []
    assert compare(folder) == [FileProblem("state/d/two", "other contents")]
    (folder / "state/d/two").write_bytes(b"four")
    assert manifest.compare(folder, known, None) == [FileProblem("state/d/two", "size 4 instead of 3")]


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda data: data[:-1], "other contents"),
        (lambda data: data[: len(data) // 2], "other contents"),
        (lambda data: b"", "empty"),
        (lambda data: data + b"\n", "other contents"),
        (lambda data: b"[]", "other contents"),
        (lambda data: b"{}", "other contents"),
        (lambda data: b"[" * 100_000, "other contents"),
        (lambda data: data.replace(b'"step": 7', b'"step": 8'), "other contents"),
        (lambda data: data.replace(b"\n ", b"\n  "), "other contents"),
    ],
)
def test_manifest_when_it_was_changed_then_damaged(folder, edit, message):
    path = folder / "manifest.json"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        manifest.read(folder)


def test_manifest_when_there_is_none_then_none(tmp_path):
    assert manifest.read(epath.Path(tmp_path)) is None
    assert manifest.read(epath.Path(tmp_path) / "nowhere") is None


def test_files_when_changed_then_each_is_named_with_what_is_wrong(folder):
    flipped = bytearray(FILES["state/d/one"])
    flipped[1000] ^= 16
    (folder / "state/d/one").write_bytes(flipped)
    (folder / "state/d/two").write_bytes(b"t" * 1234)
    (folder / "state/d/three").write_bytes(b"")
    (folder / "meta/metadata").unlink()
    os.symlink(folder / "state", folder / "link")
    (folder / "state/empty").unlink()
    (folder / "state/empty").mkdir()  # An empty folder is not a file; a bucket has no folders.
    assert compare(folder) == [
        FileProblem("link", "extra"),
        FileProblem("meta/metadata", "missing"),
        FileProblem("state/d/one", "other contents"),
        FileProblem("state/d/three", "extra"),
        FileProblem("state/d/two", "size 1,234 instead of 3"),
        FileProblem("state/empty", "missing"),
    ]


def test_files_when_systems_made_some_then_not_seen(folder):
    """Files of a desktop or NFS are not extra, not part of a written step, and not missing later."""
    known = manifest.read(folder)
    strays = [
        ".DS_Store",
        "state/.nfs00000000000af3c200000004",
        "state/d/._one",
        "Thumbs.db",
        "@eaDir/x",
        "desktop.ini",
    ]
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert compare(folder) == []
    assert sign(folder) == known
    assert manifest.compare(folder, Manifest(HEADER, {**known.sizes, ".nfs0001": 0}), None) == []
    (folder / ".DS_Store2").write_bytes(b"")
    (folder / "state/nfs0001").write_bytes(b"")
    assert compare(folder) == [
        FileProblem(".DS_Store2", "extra"),
        FileProblem("state/nfs0001", "extra"),
    ]


def test_files_when_one_is_a_pipe_then_named(folder):
    """It is not opened as a file, which would wait forever for a writer."""
    for name in ("state/empty", "state/d/two"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert compare(folder) == [
        FileProblem("state/d/two", "size 0 instead of 3"),
        FileProblem("state/empty", "not a regular file"),
    ]
    (folder / manifest.NAME).unlink()
    os.mkfifo(folder / manifest.NAME)
    with pytest.raises(ValueError, match="not a regular file"):
        manifest.read(folder)


def test_files_when_two_are_swapped_then_both_are_named(folder):
    (folder / "state/d/three").write_bytes(b"too")
    known = sign(folder)  # The previous manifest and hashes are not listed.
    assert not {manifest.NAME, manifest.HASHES} & known.sizes.keys()
    (folder / "state/d/two").write_bytes(b"too")
    (folder / "state/d/three").write_bytes(b"two")
    assert [wrong.file for wrong in compare(folder)] == ["state/d/three", "state/d/two"]


def test_progress_when_given_then_it_adds_up_to_all_bytes(folder):
    lock, calls = threading.Lock(), []

    def progress(num_bytes):
        with lock:
            calls.append(num_bytes)

    compare(folder, progress)
    assert sum(calls) == manifest.read(folder).num_bytes


def test_file_when_larger_than_what_is_read_at_a_time_then_its_hash_is_that_of_all(tmp_path):
    data = random.Random(0).randbytes(2 * manifest._CHUNK_BYTES + 17)
    (tmp_path / "file").write_bytes(data)
    assert manifest.hash_file(epath.Path(tmp_path), "file", len(data)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("number, damaged", [(5, True), (13, False), (116, False)])
def test_file_when_the_disk_cannot_read_it_then_damaged_and_a_refusal_is_an_error(folder, monkeypatch, number, damaged):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "a file")

    monkeypatch.setattr(manifest, "hash_file", fail)
    if damaged:
        assert {wrong.what for wrong in compare(folder)} == {"cannot be read (Input/output error)"}
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            compare(folder)


def test_files_when_written_then_all_are_synced_before_the_step_counts(tmp_path, monkeypatch):
    synced, sync = set(), os.fsync

    def recording_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    manifest.write(epath.Path(tmp_path), HEADER)
    folders = ("", "/meta", "/state", "/state/d")
    assert synced == {f"{tmp_path}{name}" for name in folders} | {
        f"{tmp_path}/{name}" for name in (*FILES, "manifest.json")
    }
