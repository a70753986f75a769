"""Tests of unreadable data: an outage never ends the restarts, a broken file does at its second failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.identity import identify
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_HUNG, EXIT_RETRY, StorageError, describe_exit
from aimv2_jax.resilience.repeated_failures import RepeatedFailures
from aimv2_jax.resilience.storage_failures import storage_failure
from tests.helpers.failing_storage import away
from tests.helpers.tiny import ROOT


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """The folder of nine records, one per shard."""
    source = Source("photo", str(ROOT / "aimv2_jax/data/sample/train/photo"))
    folder = tmp_path_factory.mktemp("datasets") / "photo"
    write_dataset(folder, [decode(source.read(index)) for index in range(9)], shard_bytes=1)
    return folder


@pytest.fixture
def photos(folder) -> Source:
    return Source("photo", str(folder), patience_s=0.0)


def failure(photos: Source, workdir: Path, step: int = 7) -> StorageError:
    error = StorageError("the data cannot be read since 1 s: Input/output error: FILE")
    return storage_failure(error, [photos], step, range(112, 128), RepeatedFailures(workdir, 0))


@contextlib.contextmanager
def broken(*files: Path) -> Iterator[None]:
    """Makes files unreadable: a folder takes their place (EISDIR)."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(away(file))
            file.mkdir()
            stack.callback(file.rmdir)
        yield


def test_broken_file_ends_the_run_the_second_time(photos, folder, tmp_path):
    with broken(folder / "00003.bag"):
        codes = [failure(photos, tmp_path, step).code for step in (7, 7, 8)]
        message = describe_exit(failure(photos, tmp_path))[1]
    assert codes == [EXIT_RETRY, EXIT_HUNG, EXIT_RETRY]
    assert "FILE" in message and "step 7" in message and "--skip_examples=112:128" in message
    assert (tmp_path / "hangs/00000007-00000-storage.txt").exists()


def test_outage_never_counts(photos, folder, tmp_path):
    with broken(*folder.glob("*.bag")):
        codes = [failure(photos, tmp_path).code for _ in range(3)]
    with away(folder):
        codes.append(failure(photos, tmp_path).code)
    assert codes == [EXIT_RETRY] * 4 and not (tmp_path / "hangs").exists()


def test_identity_of_a_source_with_a_broken_file(photos, folder):
    with broken(folder / "00000.bag"):  # The first record is always sampled.
        identity = identify({"photo": photos}, "ab")
    sampled = identity["sources"]["photo"]["sampled"]
    assert sampled["0"] is None and all(sampled[str(index)] for index in range(1, 9))


def test_identity_of_a_source_that_is_away(photos, folder):
    with broken(*folder.glob("*.bag")), pytest.raises(StorageError):
        identify({"photo": photos}, "ab")
