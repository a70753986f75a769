"""The output folder on a disk, and in buckets over their real protocols."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest

from aimv2_jax import version
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import EXIT_RETRY, StorageError, UserError
from aimv2_jax.prepare import runners
from aimv2_jax.prepare.__main__ import main
from aimv2_jax.prepare.filters import Rules
from aimv2_jax.prepare.output import OutputFolder, TaskResult
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.prepare.worker import Job
from aimv2_jax.storage.files import list_objects
from tests.helpers.buckets import ROOT, clients_of, proxy

FLAGS = ["--caption", "alt=json:alt", "--shard-size", "30KB"]
RUNNERS = {"one": ["--workers", "1"], "two": ["--workers", "2"], "beam": ["--runner", "beam"]}


def prepare(given, output, *flags):
    return main(["--input", str(given), "--output", str(output), *FLAGS, *flags])


@pytest.fixture(scope="module")
def local(tars, tmp_path_factory):
    """The files of the dataset that is prepared from a disk to a disk, by name."""
    folder = tmp_path_factory.mktemp("local") / "set"
    assert prepare(tars, folder, "--workers", "1") == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def no_pauses(monkeypatch):
    """No pauses between attempts; those of gcsfs begin with a second."""
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=AsyncMock()))
    monkeypatch.setattr("aimv2_jax.storage.files._PAUSES_S", (0.0,) * 4)


@pytest.mark.parametrize("runner", RUNNERS)
def test_bucket_to_bucket_equals_disk_to_disk(fake_gcs, gcs_folder, tars, upload, objects_of, local, runner):
    """From a bucket into one, the files are those from a disk to a disk, with any workers and runner."""
    given = upload(fake_gcs, tars, f"{gcs_folder}/given")
    assert prepare(given, f"{gcs_folder}/sets/one", *RUNNERS[runner]) == 0
    assert objects_of(f"{gcs_folder}/sets/one") == local


def test_emulator_bucket_equals_disk(gcs_emulator, tars, objects_of, local):
    """Another server of the protocol, which speaks HTTP/1.0, gets the same files."""
    with clients_of(gcs_emulator):
        output = gcs_emulator.new_folder()
        assert prepare(tars, output, "--workers", "1") == 0
        assert objects_of(output) == local


def test_s3_to_s3_equals_disk_to_disk(moto_s3, tars, upload, objects_of, local):
    """From S3 into S3, the files are those from a disk to a disk."""
    with clients_of(moto_s3):
        folder = moto_s3.new_folder()
        assert prepare(upload(moto_s3, tars, f"{folder}/given"), f"{folder}/set", "--workers", "1") == 0
        assert objects_of(f"{folder}/set") == local


def test_bucket_that_fails_5_percent(fake_gcs, gcs_folder, tars, upload, objects_of, local, no_pauses):
    """With one in twenty requests failing in each way, the same files are prepared."""
    given = upload(fake_gcs, tars, f"{gcs_folder}/given")
    with proxy(fake_gcs, failures=0.05, slow_ms=20.0) as proxied, clients_of(proxied):
        assert prepare(given, f"{gcs_folder}/set", "--workers", "1") == 0
        failures = proxied.counts()["failures"]
    assert len(failures) >= 4 and sum(failures.values()) >= 8  # Of the kinds, and in all.
    with clients_of(fake_gcs):
        assert objects_of(f"{gcs_folder}/set") == local


@pytest.mark.parametrize("runner", ["one", "beam"])
def test_bucket_outage_then_resume(fake_gcs, tars, objects_of, local, no_pauses, monkeypatch, capsys, runner):
    """An outage midway ends the run with one line and the code for a restart; --resume completes the dataset."""
    add_file, added = OutputFolder.add_file, []

    def add(self, part, name):
        add_file(self, part, name)
        added.append(name)
        if len(added) == 3:
            proxied.configure(failures=1.0, kinds=["503"])

    with proxy(fake_gcs, kinds=("503",)) as proxied, clients_of(proxied):
        output = proxied.new_folder()
        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "add_file", add)
            assert prepare(tars, output, *RUNNERS[runner]) == EXIT_RETRY
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("stopped: --output cannot be used: the bucket fails (") and f": {output}" in said
        assert "--resume keeps finished work. Start the same command again" in said
        proxied.configure(failures=0.0)
        assert prepare(tars, output, *RUNNERS[runner]) == 2 and "unfinished dataset" in capsys.readouterr().err
        assert prepare(tars, output, "--resume", *RUNNERS[runner]) == 0
        assert len(added) >= 3 and objects_of(output) == local


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp, of what gcsfs sends.
def test_bucket_upload_killed_then_resume(fake_gcs, tars, tmp_path, make_tar, make_image, objects_of, files_of):
    """A kill in the middle of an upload leaves no part of the object, and --resume makes the same files."""
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / "given").mkdir(exist_ok=True)
        shutil.copy(tars / name, tmp_path / "given")
    large = {"jpg": make_image(1400, 1400, "PNG"), "txt": b"A thing.", "json": {"alt": "Large."}}  # gcsfs: over 5 MiB.
    make_tar(tmp_path / "given/00002.tar", {"large": large})
    assert prepare(tmp_path / "given", tmp_path / "local", "--workers", "1") == 0
    with proxy(fake_gcs, failures=1.0, kinds=("slow",), only="uploadType=resumable", slow_ms=60_000) as proxied:
        output = proxied.new_folder()
        command = [sys.executable, "-m", "aimv2_jax.prepare", "--input", str(tmp_path / "given"), "--output", output]
        environment = os.environ | proxied.env | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen([*command, *FLAGS, "--workers", "1"], env=environment) as process:
            while not proxied.counts()["failures"]:  # The upload has begun.
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        with clients_of(fake_gcs):
            left = objects_of(output)
            assert "00001-00000.bag" in left and ".parts/00001.json" in left
            assert not [name for name in left if name.startswith("00002-") or name == "dataset.json"]
            assert prepare(tmp_path / "given", output, "--workers", "1", "--resume") == 0
            assert objects_of(output) == files_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("failures", "says"),
    [
        ({"kinds": ("401",)}, "--output cannot be used: the bucket refuses access"),
        ({"kinds": ("403",), "only": "^POST "}, "--output cannot be used: the bucket refuses access"),
        ({"kinds": ("403",), "only": "given.*tar"}, "input cannot be read (the bucket refuses access"),
    ],
)
def test_bucket_without_rights(fake_gcs, gcs_folder, tars, upload, no_pauses, capsys, failures, says):
    """Without credentials, or the right to read or write, the error is one line that names the URL and the remedy."""
    given = upload(fake_gcs, tars, f"{gcs_folder}/given")
    with proxy(fake_gcs, failures=1.0, **failures) as proxied, clients_of(proxied):
        assert prepare(given, f"{gcs_folder}/set", "--workers", "1") == 2
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] and gcs_folder in said[-1] and "permission" in said[-1]
    assert [line for line in said if line.startswith("error: ")] == said[-1:]


def test_s3_without_credentials(moto_s3, tars, monkeypatch, no_pauses, capsys):
    """Without credentials for S3, the error is one line that says so."""
    with clients_of(moto_s3):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        assert prepare(tars, f"{moto_s3.new_folder()}/set", "--workers", "1") == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: --output cannot be used: the bucket refuses access (Unable to locate credentials)")


@pytest.mark.parametrize(
    ("given", "output", "says"),
    [
        ("", "gs://missing/set", "--output cannot be used: no such object or bucket"),
        ("gs://missing/tars", "", "input cannot be read (no such object or bucket"),
        ("", "hdfs://a/set", "--output: no such kind of storage: 'hdfs://a/set'"),
        ("https://a.b/c.tar", "", "--input: no such kind of storage: 'https://a.b/c.tar'"),
    ],
)
def test_bucket_or_storage_does_not_exist(gcs_folder, tars, no_pauses, capsys, given, output, says):
    """A bucket that does not exist, and an unknown kind of storage, are errors of one line."""
    assert prepare(given or tars, output or f"{gcs_folder}/set", "--workers", "1") == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and says in said


def test_bucket_without_its_extra(tars, monkeypatch, capsys):
    """A bucket whose library is not installed is an error that names the extra, before any work."""
    monkeypatch.setattr("aimv2_jax.storage.bucket.importlib.util.find_spec", lambda name: None)
    assert prepare(tars, "gs://bucket/set") == 2
    assert "pip install 'aimv2_jax[gcs]'" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_bucket_holds_an_older_dataset(fake_gcs, gcs_folder, tars, capsys, resume):
    """A folder of a bucket with a dataset of an older version is refused and left as it is."""
    fake_gcs.write(f"{gcs_folder}/00000-00000.arrayrecord", b"records")
    fake_gcs.write(f"{gcs_folder}/dataset.json", json.dumps({"format_version": 3}).encode())
    assert prepare(tars, gcs_folder, *resume) == 2
    assert f"--output already contains a dataset: '{gcs_folder}'" in capsys.readouterr().err
    assert list_objects(gcs_folder).keys() == {"00000-00000.arrayrecord", "dataset.json"}


def test_failure_when_another_try_made_it_good_then_none(tmp_path):
    folder, (first, second) = OutputFolder(str(tmp_path)), (Task(number, (), 9) for number in range(2))
    assert folder.begin({}, [first, second], resume=False) is None
    folder.fail_task(first, UserError("task 0", "x", "Go on"))
    folder.fail_task(second, StorageError("task 1"))
    failure = folder.failure()
    assert isinstance(failure, UserError) and (failure.what, failure.remedy) == ("task 0", "Go on")
    folder.finish_task(first, TaskResult((), DatasetStats()))
    failure = folder.failure()
    assert isinstance(failure, StorageError) and str(failure) == "task 1"
    folder.finish_task(second, TaskResult((), DatasetStats()))
    assert folder.failure() is None


@pytest.mark.parametrize(
    ("error", "again"), [(StorageError("something"), True), (UserError("something", "x", "Fix it"), False)]
)
def test_beam_task_error_recorded(tmp_path, monkeypatch, error, again):
    """An error of a Beam task is recorded, and one of a bucket that may work later is raised for another try."""

    def fail(*_):
        raise error

    task, job = Task(0, (), 9), Job(str(tmp_path), Rules())
    OutputFolder(str(tmp_path)).begin({}, [task], resume=False)
    monkeypatch.setattr(Job, "run", fail)
    with pytest.raises(StorageError) if again else contextlib.nullcontext():
        runners._run_recording_errors(task, job)
    assert OutputFolder(str(tmp_path)).failure().args == error.args


def test_resume_when_the_program_is_another_then_refused(tmp_path, monkeypatch):
    folder = OutputFolder(str(tmp_path))
    folder.begin({}, [], resume=False)
    assert folder.begin({}, [], resume=True) is None
    monkeypatch.setattr(version, "__version__", "99.0")
    with pytest.raises(UserError, match=r"the program is not aimv2_jax .*, with which this work began.*99\.0"):
        folder.begin({}, [], resume=True)


def test_index_of_a_damaged_shard_is_refused(tmp_path):
    """A finished shard that is no bag file any more is named, and no index is written."""
    folder = OutputFolder(str(tmp_path))
    folder.begin({}, [], resume=False)
    (tmp_path / "0.bag").write_bytes(bytes(30))
    with pytest.raises(UserError, match=r"--output has a damaged shard \(0\.bag does not end with"):
        folder.add_index([Shard("0.bag", 2, 30)])
    assert not (tmp_path / "records.index").exists()
