"""Temporary storage failures change no example; permanent ones end the run with the code for a restart."""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.data.pipeline import open_sources, training_batches
from aimv2_jax.data.records import encode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_RETRY, StorageError, UserError, describe_exit
from aimv2_jax.storage import retries
from aimv2_jax.storage.retries import patience_s
from tests.helpers.failing_storage import away, fail_reads

# Tests with worker processes run one at a time, since parallel ones would starve time-dependent tests.
pytestmark = pytest.mark.xdist_group("data workers")


@pytest.fixture
def red(make_dataset):
    """The folder of a dataset of five shards that was not opened yet."""
    return Path(make_dataset("red", 5, shard_bytes=1))


def shard(folder, index=1):
    return folder / f"{index:05d}.bag"


def replaced_by(make):
    @contextlib.contextmanager
    def replaced(file):
        with away(file):
            make(file)
            yield
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()

    return replaced


looped = replaced_by(lambda file: file.symlink_to(file))


@contextlib.contextmanager
def emptied(file):
    data = file.read_bytes()
    os.truncate(file, 0)
    yield
    file.write_bytes(data)


@contextlib.contextmanager
def no_more_files(_):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def forbidden(file):
    """Removes read permission, also for root, who switches to another user meanwhile."""
    file.chmod(0)
    user, other = os.geteuid(), 65534  # nobody.
    if user == 0:
        os.seteuid(other)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        file.chmod(0o644)


@pytest.mark.parametrize(
    ("failing", "error", "what"),
    [
        (away, StorageError, "No such file or directory"),
        (replaced_by(lambda file: file.mkdir()), StorageError, "Is a directory"),
        (looped, StorageError, "Too many levels of symbolic links"),
        (no_more_files, UserError, r"too many files are open .*ulimit -n"),
        (forbidden, UserError, r"Permission denied.*Give yourself permission"),
        (emptied, UserError, "shorter than dataset.json says"),
    ],
)
def test_read_when_its_shard_fails(red, failing, error, what):
    """Each failure of a shard ends with an error that says so, and none is taken for a damaged record."""
    source = Source("red", str(red), patience_s=0.1)
    with failing(shard(red)), pytest.raises(error, match=what):
        source.read(1)


def test_read_when_it_fails_once(red, make_record):
    """A read that fails once is made again, and counted."""
    source = Source("red", str(red))
    source.read(1)
    assert fail_reads(red) == 1
    retries.DATA_RETRIES.take()
    assert source.read(1) == encode(make_record("red", 1))
    assert retries.DATA_RETRIES.take() == 1


def test_read_when_an_outage_lasts(red, make_record, capfd):
    """An outage is logged once when it is more than a blip, and its end."""
    source = Source("red", str(red))
    with contextlib.ExitStack() as stack:
        stack.enter_context(away(shard(red)))
        timer = threading.Timer(1.0, stack.pop_all().close)
        timer.start()
        assert source.read(1) == encode(make_record("red", 1))
        timer.join()
    stderr = capfd.readouterr().err
    assert stderr.count(f"cannot read {shard(red)} (No such file or directory); retrying for up to 150 s") == 1
    assert f"{red} can be read again, after 1." in stderr


def test_read_when_the_shard_is_away_for_a_while(red, make_record):
    source = Source("red", str(red), patience_s=30)
    with contextlib.ExitStack() as stack:
        stack.enter_context(away(shard(red)))
        timer = threading.Timer(0.2, stack.pop_all().close)
        timer.start()
        assert source.read(1) == encode(make_record("red", 1))
        timer.join()


def test_read_when_the_shard_stays_away(red, make_record):
    source = Source("red", str(red), patience_s=0.3)
    with away(shard(red)), away(shard(red, 2)):
        began_s = time.monotonic()
        with pytest.raises(StorageError, match=r"since 0 s: No such file or directory: .*00001\.bag") as error:
            source.read(1)
        assert 0.3 <= time.monotonic() - began_s < 3
        code, line = describe_exit(error.value)
        assert code == EXIT_RETRY and "Start the same command again" in line
        began_s = time.monotonic()
        with pytest.raises(StorageError):  # The retry time is shared by the folder.
            source.read(2)
        assert time.monotonic() - began_s < 0.3
    assert source.read(2) == encode(make_record("red", 2))


def test_source_when_its_folder_fails_at_the_start(red, monkeypatch):
    """A mounted bucket whose daemon has ended (ENOTCONN, fuse(4)) is waited for when a source is opened."""
    scandir, errors = os.scandir, [OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(red))] * 2

    def failing(path):
        if path == red and errors:
            raise errors.pop()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert len(Source("red", str(red))) == 5
    errors += [OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(red))] * 99
    with pytest.raises(StorageError, match="Transport endpoint is not connected"):
        Source("red", str(red), patience_s=0.2)


def test_source_when_its_folder_is_forbidden(red):
    with (
        forbidden(red / "dataset.json"),
        pytest.raises(UserError, match=r"permission denied.*Grant yourself"),
    ):
        Source("red", str(red))


def test_batches_when_reads_fail_once_then_the_same_bytes(make_config, datasets, tmp_path):
    copies = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in datasets.items()}
    with training_batches(make_config(), range, 0) as undisturbed:
        expected = list(itertools.islice(undisturbed, 8))
    with training_batches(make_config(copies), range, 0) as batches:
        actual, failed = [], 0
        for _ in range(8):
            failed += sum(map(fail_reads, copies.values()))
            actual.append(next(batches))
    retries_made = sum(int(batch.arrays.pop("read_retries").sum()) for batch in actual)
    assert failed > 0 and retries_made > 0
    for batch, reference in zip(actual, expected, strict=True):
        assert batch.faults == reference.faults == []
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, reference.arrays[name], err_msg=name, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_when_storage_stays_away(make_config, red, datasets, workers):
    config = make_config({"red": str(red), "blue": datasets["blue"]}, watch__data_s=2, data__workers=workers)
    sources = open_sources(config).training
    with contextlib.ExitStack() as stack:
        for index in range(5):
            stack.enter_context(looped(shard(red, index)))
        batches = stack.enter_context(training_batches(config, range, 0, sources=sources))
        with pytest.raises(StorageError, match=r"since 0 s: Too many levels of symbolic links: .*bag"):
            list(itertools.islice(batches, 4))


def test_patience_when_nothing_is_watched():
    assert (patience_s(600), patience_s(0)) == (150, retries.PATIENCE_S)


def test_busy_bucket_is_waited_for(monkeypatch):
    """A read that a bucket refuses for long is no outage while other reads from it succeed."""
    monkeypatch.setattr(retries, "_MAX_PAUSE_S", 0.05)
    attempts = itertools.count()

    def throttled():
        if next(attempts) < 20:
            retries.retry(lambda: b"other", "gs://bucket/set/b.bag", 0.3)
            raise OSError(errno.EAGAIN, "the bucket fails (429)", "gs://bucket/set/a.bag")
        return b"record"

    began_s = time.monotonic()
    assert retries.retry(throttled, "gs://bucket/set/a.bag", 0.3) == b"record"
    assert time.monotonic() - began_s > 0.6
