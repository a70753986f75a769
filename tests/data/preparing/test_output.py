"""Output: in a bucket as on the disk."""

import contextlib

import pytest
from bucket import stand_in

import aimv2_jax
from aimv2_jax.data.books import Books
from aimv2_jax.data.prepare import main
from aimv2_jax.data.preparing import output, runners
from aimv2_jax.data.preparing.checks import Rules
from aimv2_jax.data.preparing.groups import Task
from aimv2_jax.data.preparing.output import BucketError, Done, Output
from aimv2_jax.data.preparing.work import Job
from aimv2_jax.errors import UserError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, kept in a local folder."""
    return stand_in(tmp_path / "bucket", monkeypatch)


FLAGS = ["--caption", "alt=json:alt", "--shard-size", "30KB"]


def prepare(tars, output, *flags):
    return main(["--input", str(tars), "--output", str(output), *FLAGS, *flags])


def test_bucket_when_it_is_the_output_then_the_same_files_as_on_the_disk(bucket, tars, tmp_path, files_of):
    assert prepare(tars, "gs://bucket/sets/one", "--workers", "1") == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "sets/one") == files_of(tmp_path / "local")


@pytest.mark.parametrize("runner", ["local", "beam"])
def test_bucket_when_it_fails_midway_then_one_line_and_resume_goes_on(
    bucket, tars, tmp_path, files_of, monkeypatch, capsys, runner
):
    flags = ["--workers", "1"] if runner == "local" else ["--runner", "beam"]
    place, placed = Output.place.__wrapped__, []

    def failing(self, part, name):
        if len(placed) == 3:
            raise RuntimeError("503")  # Backends have kinds of their own.
        placed.append(name)
        place(self, part, name)

    monkeypatch.setattr(Output, "place", output._asks_bucket(failing))
    assert prepare(tars, "gs://bucket/one", *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --output cannot be used: 'gs://bucket/one'") and "503" in said and "--resume" in said
    monkeypatch.setattr(Output, "place", output._asks_bucket(place))
    assert prepare(tars, "gs://bucket/one", *flags) == 2 and "not finished" in capsys.readouterr().err
    assert prepare(tars, "gs://bucket/one", "--resume", *flags) == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "one") == files_of(tmp_path / "local")


def test_failure_when_another_try_made_it_good_then_none(tmp_path):
    place, (first, second) = Output(str(tmp_path)), (Task(number, (), 9) for number in range(2))
    assert place.begin({}, [first, second], resume=False) is None
    for task in (first, second):
        place.fail_task(task, UserError(f"task {task.number}", "x", "Go on"))
    assert place.failure().what == "task 0"
    place.finish_task(first, Done((), Books()))
    assert place.failure().what == "task 1"
    place.finish_task(second, Done((), Books()))
    assert place.failure() is None


@pytest.mark.parametrize(("kind", "again"), [(BucketError, True), (UserError, False)])
def test_beam_when_a_task_meets_what_the_user_can_mend_then_noted_and_a_bucket_is_asked_again(
    tmp_path, monkeypatch, kind, again
):
    def fail(*_):
        raise kind("something", "x", "Mend it")

    task, job = Task(0, (), 9), Job(str(tmp_path), Rules())
    Output(str(tmp_path)).begin({}, [task], resume=False)
    monkeypatch.setattr(runners, "run_task", fail)
    with pytest.raises(BucketError) if again else contextlib.nullcontext():
        runners._noting(task, job)
    assert Output(str(tmp_path)).failure().what == "something"


def test_resume_when_the_program_is_another_then_refused(tmp_path, monkeypatch):
    place = Output(str(tmp_path))
    place.begin({}, [], resume=False)
    assert place.begin({}, [], resume=True) is None
    monkeypatch.setattr(aimv2_jax, "__version__", "99.0")
    with pytest.raises(UserError, match=r"the program is not aimv2_jax .*, with which this work began.*99\.0"):
        place.begin({}, [], resume=True)
