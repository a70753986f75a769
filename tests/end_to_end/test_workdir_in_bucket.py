"""Tests of a workdir in a bucket: the run equals one on a disk, stops and resumes, and writes all of its files."""

from __future__ import annotations

import json

import pytest
from etils import epath

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, parse_spec
from aimv2_jax.main import main
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.storage import append
from tests.helpers.bucket import NAME, stand_in, stand_in_for_arrays
from tests.helpers.runs import assert_bitwise, broken_source, saved_state
from tests.helpers.tiny import tiny_arguments

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("two_devices")]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    root = stand_in(tmp_path / "bucket", monkeypatch)
    stand_in_for_arrays(root, monkeypatch)
    return root


def written_at_saves(file, monkeypatch) -> dict[int, list[int]]:
    """The steps in the bucket's metrics when a save starts, by the step of the save."""
    save, written = Checkpointer.save, {}
    monkeypatch.setattr(append, "_UPLOAD_INTERVAL_S", 1000.0)

    def watched(self, step, *args, **kwargs):
        if str(self._folder).startswith(NAME):
            written[step] = [line["step"] for line in map(json.loads, file.read_text().splitlines())]
        save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", watched)
    return written


def test_run_when_its_workdir_is_in_a_bucket_then_that_of_a_disk_and_goes_on_exactly(
    bucket, tmp_path, capsys, monkeypatch
):
    data = broken_source(tmp_path / "data", good=50, bad=1)
    changes = dict(data__sources__photo=data, data__max_bad_fraction=0.5, eval__max_examples=8, train__tensorboard=True)
    workdir, disk = f"{NAME}/runs/one", tmp_path / "disk"
    written = written_at_saves(bucket / "runs/one/metrics.jsonl", monkeypatch)
    assert main(tiny_arguments(workdir, train__steps=10, train__save_every=5, train__keep=1, **changes)) == 0
    assert written == {5: [5], 10: [5, 10, 10]}  # Otherwise a crash after a save would leave a gap in the metrics.
    assert "in a bucket, which has no locks" in capsys.readouterr().out
    assert CheckpointReader(workdir).steps() == [10]
    assert main(tiny_arguments(workdir, train__profile="(12, 14)", **changes)) == 0
    assert "continuing from step 10" in capsys.readouterr().out
    assert main(tiny_arguments(disk, train__profile="(12, 14)", train__eval_every=10, **changes)) == 0
    assert CheckpointReader(workdir).steps() == CheckpointReader(disk).steps() == [10, 20]
    assert CheckpointReader(workdir).best_step() == parse_spec(workdir)[1] == CheckpointReader(disk).best_step()
    assert_bitwise(saved_state(workdir, 20), saved_state(disk, 20))
    files = bucket / "runs/one"
    assert (files / "bad_records.jsonl").read_bytes() == (disk / "bad_records.jsonl").read_bytes()
    assert "train.steps = 20" in (files / "config.txt").read_text()
    for ours, theirs in zip(read_metrics(workdir), read_metrics(disk)):
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for name in ("loss", "eval_loss"):
            assert [line.get(name) for line in ours] == [line.get(name) for line in theirs]
    events = list((files / "tensorboard").iterdir())
    assert len(events) == 2 and all(file.stat().st_size > 1000 for file in events)
    [trace] = (files / "profile/plugins/profile/steps_12_to_13").glob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    assert not (files / "lock").exists() and not list(files.rglob("*.part"))


def test_run_when_the_bucket_cannot_be_reached_then_one_line(bucket, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("Error executing an HTTP request:\n could not resolve host")

    monkeypatch.setattr(type(epath.Path(NAME)), "mkdir", refuse)
    assert main(tiny_arguments(f"{NAME}/runs/one")) == 2
    error = capsys.readouterr().err
    assert "--workdir gs://bucket/runs/one cannot be used" in error and error.count("\n") == 1
