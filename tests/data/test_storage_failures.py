"""Temporary storage failures change no example; permanent ones end the run with the code for a restart."""

import contextlib
import itertools
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.data import sources
from aimv2_jax.data.pipeline import training_batches
from aimv2_jax.data.records import BadRecord, encode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_RETRY, StorageError, UserError, describe_exit
from aimv2_jax.storage import retries
from aimv2_jax.storage.retries import patience_s, system_errno
from tests.helpers.failing_storage import away, fail_reads

# Tests with worker processes run one at a time, since parallel ones would starve time-dependent tests.
pytestmark = pytest.mark.xdist_group("data workers")


@pytest.fixture
def red(make_dataset):
    """The folder of a dataset of five shards that was not opened yet."""
    return Path(make_dataset("red", 5, shard_bytes=1))


def shard(folder, index=1):
    return folder / f"{index:05d}.arrayrecord"


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
    ("failing", "name"),
    [
        (away, "ENOENT"),
        (replaced_by(lambda file: file.mkdir()), "EISDIR"),
        (looped, "ELOOP"),
        (no_more_files, "EMFILE"),
        (forbidden, "EACCES"),
    ],
)
def test_errno_when_array_record_cannot_open(red, failing, name):
    with failing(shard(red)), pytest.raises(RuntimeError) as error:
        sources._open(shard(red)).read([0])
    assert retries.errno.errorcode[system_errno(error.value)] == name


def test_errno_when_array_record_cannot_read(red):
    reader = sources._open(shard(red))
    reader.read([0])
    assert fail_reads(red) == 1
    with pytest.raises(RuntimeError, match=r"^pread\(\) failed: Input/output error") as error:
        reader.read([0])
    assert retries.errno.errorcode[system_errno(error.value)] == "EIO"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch (computed 0x9b, stored 0x57)"),
        RuntimeError("ArrayRecord file should be at least 64KB big"),
        ValueError("open() failed: Input/output error"),
        MemoryError(),
    ],
)
def test_errno_when_no_system_call_failed(error):
    assert system_errno(error) is None


def test_read_when_it_fails_once(red, make_record, capfd):
    source = Source("red", str(red))
    source.read(1)
    assert fail_reads(red) == 1
    assert source.read(1) == encode(make_record("red", 1))
    stderr = capfd.readouterr().err
    assert f"cannot read {shard(red)} (Input/output error); retrying for up to 150 s" in stderr
    assert f"{red} can be read again, after 0." in stderr


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
        with pytest.raises(StorageError, match=r"since 0 s: No such file or directory: .*00001\.arrayrecord") as error:
            source.read(1)
        assert 0.3 <= time.monotonic() - began_s < 3
        code, line = describe_exit(error.value)
        assert code == EXIT_RETRY and "Start the same command again" in line
        began_s = time.monotonic()
        with pytest.raises(StorageError):  # The retry time is shared by the folder.
            source.read(2)
        assert time.monotonic() - began_s < 0.3
    assert source.read(2) == encode(make_record("red", 2))


def test_read_when_the_shard_is_forbidden(red):
    source = Source("red", str(red), patience_s=0.1)
    with forbidden(shard(red)), pytest.raises(UserError, match=r"Permission denied.*00001.*Give yourself permission"):
        source.read(1)


def test_read_when_the_record_is_damaged_then_nothing_is_tried_again(red):
    file = shard(red)
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    began_s = time.monotonic()
    with pytest.raises(BadRecord, match="unreadable_record"):
        Source("red", str(red)).read(1)
    assert time.monotonic() - began_s < 1


def test_source_when_its_folder_fails_at_the_start(red, monkeypatch):
    """stat(2) fails with ENOTCONN for a mounted bucket whose daemon has ended (fuse(4)); pathlib raises that."""
    is_dir, errors = Path.is_dir, [OSError(retries.errno.ENOTCONN, os.strerror(retries.errno.ENOTCONN), str(red))] * 2

    def failing(path):
        if path == red and errors:
            raise errors.pop()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", failing)
    assert len(Source("red", str(red))) == 5
    errors += [OSError(retries.errno.ENOTCONN, os.strerror(retries.errno.ENOTCONN), str(red))] * 99
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
    assert failed > 0
    for batch, reference in zip(actual, expected, strict=True):
        assert batch.faults == reference.faults == []
        for name, array in batch.arrays.items():
            np.testing.assert_array_equal(array, reference.arrays[name], err_msg=name, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_when_storage_stays_away(make_config, red, datasets, workers):
    config = make_config({"red": str(red), "blue": datasets["blue"]}, watch__data_s=2, data__workers=workers)
    with contextlib.ExitStack() as stack:
        for index in range(5):
            stack.enter_context(looped(shard(red, index)))  # Listed, but unreadable, so that the run starts.
        batches = stack.enter_context(training_batches(config, range, 0))
        with pytest.raises(StorageError, match=r"since 0 s: Too many levels of symbolic links: .*arrayrecord"):
            list(itertools.islice(batches, 4))


def test_patience_when_nothing_is_watched():
    assert (patience_s(600), patience_s(0)) == (150, retries.PATIENCE_S)
