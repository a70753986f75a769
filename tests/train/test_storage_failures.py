"""Data that cannot be read: an outage may be waited for however often, one broken file ends the run the second time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_storage import away
from tiny import ROOT, tiny_config

from aimv2_jax.data.datasets import write_dataset
from aimv2_jax.data.identity import identify
from aimv2_jax.data.pipeline import open_sources
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_AGAIN, EXIT_HUNG, StorageError, last_words
from aimv2_jax.train.interruptions import Interruptions
from aimv2_jax.train.storage_failures import storage_failure


@pytest.fixture
def photos(tmp_path_factory) -> Path:
    """Nine records, a shard each, which this process has not opened."""
    source = Source("photo", str(ROOT / "aimv2_jax/data/sample/train/photo"))
    folder = tmp_path_factory.mktemp("sets") / "photo"
    write_dataset(folder, [decode(source.read(index)) for index in range(9)], shard_bytes=1)
    return folder


def failure(photos: Path, workdir: Path, step: int = 7) -> StorageError:
    config = tiny_config(data__sources={"photo": str(photos)}, data__mixture={"photo": {"alt": 1.0}})
    error = StorageError("the data cannot be read since 1 s: Input/output error: FILE")
    return storage_failure(error, config, step, range(112, 128), Interruptions(workdir, 0))


@contextlib.contextmanager
def broken(*files: Path) -> Iterator[None]:
    """Files that the system refuses to read: folders in their place (EISDIR)."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(away(file))
            file.mkdir()
            stack.callback(file.rmdir)
        yield


def test_broken_file_ends_the_run_the_second_time(photos, tmp_path):
    with broken(photos / "00003.arrayrecord"):
        codes = [failure(photos, tmp_path, step).code for step in (7, 7, 8)]
        told = last_words(failure(photos, tmp_path))[1]
    assert codes == [EXIT_AGAIN, EXIT_HUNG, EXIT_AGAIN]
    assert "FILE" in told and "step 7" in told and "--skip_examples=112:128" in told
    assert (tmp_path / "hangs/00000007-00000-storage.txt").exists()


def test_outage_never_counts(photos, tmp_path):
    with broken(*photos.glob("*.arrayrecord")):
        codes = [failure(photos, tmp_path).code for _ in range(3)]
    with away(photos):
        codes.append(failure(photos, tmp_path).code)
    assert codes == [EXIT_AGAIN] * 4 and not (tmp_path / "hangs").exists()


def test_identity_of_a_source_with_a_broken_file(photos):
    with broken(photos / "00000.arrayrecord"):  # Its first record is always among those that are looked at.
        found = identify(open_sources({"photo": str(photos)}, patience_s=0.0), "ab")
    sampled = found["sources"]["photo"]["sampled"]
    assert sampled["0"] is None and all(sampled[str(index)] for index in range(1, 9))


def test_identity_of_a_source_that_is_away(photos):
    with broken(*photos.glob("*.arrayrecord")), pytest.raises(StorageError):
        identify(open_sources({"photo": str(photos)}, patience_s=0.0), "ab")
