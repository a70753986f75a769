"""Tests of unreadable data: an outage never ends the restarts, a broken file does at its second failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.identity import identify
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source, open_datasets
from aimv2_jax.errors import EXIT_HUNG, EXIT_RETRY, StorageError, describe_exit
from aimv2_jax.resilience.repeated_failures import RepeatedFailures
from aimv2_jax.resilience.storage_failures import storage_failure
from tests.helpers.failing_storage import away
from tests.helpers.tiny import ROOT, tiny_config


@pytest.fixture
def photos(tmp_path_factory) -> Path:
    """Nine records, one per shard, which this process has not opened."""
    source = Source("photo", str(ROOT / "aimv2_jax/data/sample/train/photo"))
    folder = tmp_path_factory.mktemp("datasets") / "photo"
    write_dataset(folder, [decode(source.read(index)) for index in range(9)], shard_bytes=1)
    return folder


def failure(photos: Path, workdir: Path, step: int = 7) -> StorageError:
    config = tiny_config(data__sources={"photo": str(photos)}, data__mixture={"photo": {"alt": 1.0}})
    error = StorageError("the data cannot be read since 1 s: Input/output error: FILE")
    return storage_failure(error, config, step, range(112, 128), RepeatedFailures(workdir, 0))


@contextlib.contextmanager
def broken(*files: Path) -> Iterator[None]:
    """Makes files unreadable: a folder takes their place (EISDIR)."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(away(file))
            file.mkdir()
            stack.callback(file.rmdir)
        yield


def test_broken_file_ends_the_run_the_second_time(photos, tmp_path):
    with broken(photos / "00003.arrayrecord"):
        codes = [failure(photos, tmp_path, step).code for step in (7, 7, 8)]
        message = describe_exit(failure(photos, tmp_path))[1]
    assert codes == [EXIT_RETRY, EXIT_HUNG, EXIT_RETRY]
    assert "FILE" in message and "step 7" in message and "--skip_examples=112:128" in message
    assert (tmp_path / "hangs/00000007-00000-storage.txt").exists()


def test_outage_never_counts(photos, tmp_path):
    with broken(*photos.glob("*.arrayrecord")):
        codes = [failure(photos, tmp_path).code for _ in range(3)]
    with away(photos):
        codes.append(failure(photos, tmp_path).code)
    assert codes == [EXIT_RETRY] * 4 and not (tmp_path / "hangs").exists()


def test_identity_of_a_source_with_a_broken_file(photos):
    with broken(photos / "00000.arrayrecord"):  # The first record is always sampled.
        identity = identify(open_datasets({"photo": str(photos)}, patience_s=0.0), "ab")
    sampled = identity["sources"]["photo"]["sampled"]
    assert sampled["0"] is None and all(sampled[str(index)] for index in range(1, 9))


def test_identity_of_a_source_that_is_away(photos):
    with broken(*photos.glob("*.arrayrecord")), pytest.raises(StorageError):
        identify(open_datasets({"photo": str(photos)}, patience_s=0.0), "ab")
