"""The output folder in a bucket and on a disk."""

import contextlib

import pytest

from aimv2_jax import version
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.errors import UserError
from aimv2_jax.prepare import output, runners
from aimv2_jax.prepare.__main__ import main
from aimv2_jax.prepare.filters import Rules
from aimv2_jax.prepare.output import BucketError, OutputFolder, TaskResult
from aimv2_jax.prepare.tasks import Task
from aimv2_jax.prepare.worker import Job
from tests.helpers.bucket import stand_in


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, emulated in a local folder."""
    return stand_in(tmp_path / "bucket", monkeypatch)


FLAGS = ["--caption", "alt=json:alt", "--shard-size", "30KB"]


def prepare(tars, output, *flags):
    return main(["--input", str(tars), "--output", str(output), *FLAGS, *flags])


def test_bucket_when_it_is_the_output_then_the_same_files_as_on_the_disk(bucket, tars, tmp_path, files_of):
    assert prepare(tars, "gs://bucket/sets/one", "--workers", "1") == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "sets/one") == files_of(tmp_path / "local")


@pytest.mark.parametrize("runner", ["local", "beam"])
def test_bucket_error_midway_then_resume(bucket, tars, tmp_path, files_of, monkeypatch, capsys, runner):
    """A bucket that fails midway gives a one-line error, and --resume completes the dataset."""
    flags = ["--workers", "1"] if runner == "local" else ["--runner", "beam"]
    add_file, added = OutputFolder.add_file.__wrapped__, []

    def failing(self, part, name):
        if len(added) == 3:
            raise RuntimeError("503")  # Bucket backends raise their own types.
        added.append(name)
        add_file(self, part, name)

    monkeypatch.setattr(OutputFolder, "add_file", output._raises_bucket_errors(failing))
    assert prepare(tars, "gs://bucket/one", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --output cannot be used: 'gs://bucket/one'") and "503" in said and "--resume" in said
    monkeypatch.setattr(OutputFolder, "add_file", output._raises_bucket_errors(add_file))
    assert prepare(tars, "gs://bucket/one", *flags) == 2 and "unfinished dataset" in capsys.readouterr().err
    assert prepare(tars, "gs://bucket/one", "--resume", *flags) == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "one") == files_of(tmp_path / "local")


def test_failure_when_another_try_made_it_good_then_none(tmp_path):
    folder, (first, second) = OutputFolder(str(tmp_path)), (Task(number, (), 9) for number in range(2))
    assert folder.begin({}, [first, second], resume=False) is None
    for task in (first, second):
        folder.fail_task(task, UserError(f"task {task.number}", "x", "Go on"))
    assert folder.failure().what == "task 0"
    folder.finish_task(first, TaskResult((), DatasetStats()))
    assert folder.failure().what == "task 1"
    folder.finish_task(second, TaskResult((), DatasetStats()))
    assert folder.failure() is None


@pytest.mark.parametrize(("kind", "again"), [(BucketError, True), (UserError, False)])
def test_beam_task_error_recorded(tmp_path, monkeypatch, kind, again):
    """An error of a Beam task that the user can fix is recorded, and a bucket is tried again."""

    def fail(*_):
        raise kind("something", "x", "Fix it")

    task, job = Task(0, (), 9), Job(str(tmp_path), Rules())
    OutputFolder(str(tmp_path)).begin({}, [task], resume=False)
    monkeypatch.setattr(runners, "run_task", fail)
    with pytest.raises(BucketError) if again else contextlib.nullcontext():
        runners._run_recording_errors(task, job)
    assert OutputFolder(str(tmp_path)).failure().what == "something"


def test_resume_when_the_program_is_another_then_refused(tmp_path, monkeypatch):
    folder = OutputFolder(str(tmp_path))
    folder.begin({}, [], resume=False)
    assert folder.begin({}, [], resume=True) is None
    monkeypatch.setattr(version, "__version__", "99.0")
    with pytest.raises(UserError, match=r"the program is not aimv2_jax .*, with which this work began.*99\.0"):
        folder.begin({}, [], resume=True)
