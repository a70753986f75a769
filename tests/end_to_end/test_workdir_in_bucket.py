"""Tests of a workdir in a bucket: the run equals one on a disk, stops and resumes, and outlives failures."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader, parse_spec
from aimv2_jax.main import main
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.storage import append
from aimv2_jax.storage.files import list_objects, read_bytes
from aimv2_jax.storage.retries import STORAGE_RETRIES
from tests.helpers.buckets import clients_of
from tests.helpers.failing_bucket import fail, succeed
from tests.helpers.runs import assert_bitwise, broken_source, saved_state
from tests.helpers.tiny import ROOT, tiny_arguments

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("two_devices")]

# Endings of metrics that depend on the clock.
MEASURED = ("_s", "_per_s", "_fraction", "_depth", "mfu", "storage_retries", "read_retries")


def written_at_saves(workdir: str, monkeypatch) -> dict[int, list[int]]:
    """The steps in the bucket's metrics when a save starts, by the step of the save."""
    save, written = Checkpointer.save, {}
    monkeypatch.setattr(append, "_UPLOAD_INTERVAL_S", 1000.0)

    def watched(self, step, *args, **kwargs):
        if str(self._folder).startswith(workdir):
            lines = read_bytes(f"{workdir}/metrics.jsonl").splitlines()
            written[step] = [line["step"] for line in map(json.loads, lines)]
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", watched)
    return written


def assert_same_metrics(workdir, other) -> None:
    """Checks that all metrics but measured times are equal, line by line."""
    for ours, theirs in zip(read_metrics(workdir), read_metrics(other), strict=True):
        assert [_unmeasured(line) for line in ours] == [_unmeasured(line) for line in theirs]


def _unmeasured(line: dict) -> dict:
    return {name: value for name, value in line.items() if not name.endswith(MEASURED)}


def test_run_in_bucket(gcs_folder, tmp_path, capsys, monkeypatch):
    """A run whose workdir is in a bucket, stopped and continued, equals one on a disk and writes all of its files."""
    data = broken_source(tmp_path / "data", good=50, bad=1)
    changes = dict(data__sources__photo=data, data__max_bad_fraction=0.5, eval__max_examples=8, train__tensorboard=True)
    workdir, disk = gcs_folder, tmp_path / "disk"
    written = written_at_saves(workdir, monkeypatch)
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
    assert_same_metrics(workdir, disk)
    assert read_bytes(f"{workdir}/bad_records.jsonl") == (disk / "bad_records.jsonl").read_bytes()
    assert b"train.steps = 20" in read_bytes(f"{workdir}/config.txt")
    objects = list_objects(workdir)
    events = [size for name, size in objects.items() if name.startswith("tensorboard/")]
    assert len(events) == 2 and min(events) > 1000
    assert max(size for name, size in objects.items() if name.startswith("profile/plugins/profile/steps_12")) > 10_000
    assert {"checkpoints/10/hashes.json", "checkpoints/20/hashes.json"} < objects.keys()
    assert not [name for name in objects if "lock" in name or "part" in name or "probe" in name]


def test_run_in_bucket_with_failures(failing_gcs, tmp_path):
    """With 5 % of the requests failing, the run equals one on a disk, and counts its retries."""
    changes = dict(train__steps=10, train__save_every=5)
    workdir, disk = failing_gcs.new_folder(), tmp_path / "disk"
    # fake-gcs-server, unlike GCS, forgets a resumable upload as soon as it is complete, so it cannot be retried.
    kinds, all_but_resumable = ("429", "503", "reset", "cut", "short", "slow"), "^(?!.*uploadType=resumable)"
    failing_gcs.configure(failures=0.05, kinds=kinds, only=all_but_resumable, limit=None, slow_ms=10.0, seed=3)
    assert main(tiny_arguments(workdir, **changes)) == 0
    # TensorStore and Orbax do not retry a refusal, so these are for our own requests.
    ours = r"jsonl|hashes\.json|manifest\.json|config\.txt|uploadType=multipart|prefix=[^&]*checkpoints(/|%2F)(&|$)"
    failing_gcs.configure(failures=0.2, kinds=("403", "404"), only=ours)
    assert main(tiny_arguments(workdir, train__steps=20, train__save_every=5)) == 0
    succeed(failing_gcs)
    STORAGE_RETRIES.take()  # Those after the last line of the metrics.
    assert main(tiny_arguments(disk, train__steps=20, train__save_every=5, train__eval_every=10)) == 0
    assert CheckpointReader(workdir).steps() == CheckpointReader(disk).steps()
    assert_bitwise(saved_state(workdir, 20), saved_state(disk, 20))
    assert_same_metrics(workdir, disk)
    assert sum(line.get("storage_retries", 0) for line in read_metrics(workdir)[0]) > 0
    assert not any("storage_retries" in line for line in read_metrics(disk)[0])


def start(workdir: str, server, **changes) -> subprocess.Popen:
    """Starts a trainer process whose workdir is in the bucket of `server`."""
    command = [sys.executable, "-m", "aimv2_jax.main", *tiny_arguments(workdir, **changes)]
    environment = (
        os.environ | server.env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    )
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


LONG = dict(train__steps=40, train__save_every=10, train__log_every=1, train__keep=1)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """A run on a disk that is not interrupted."""
    workdir = tmp_path_factory.mktemp("long") / "run"
    assert main(tiny_arguments(workdir, **LONG)) == 0
    return workdir


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_run_in_bucket_killed(fake_gcs, long_run, number, code):
    """A run that is killed, or asked to stop, after its first checkpoint continues to the same state and metrics."""
    workdir = fake_gcs.new_folder()
    with clients_of(fake_gcs), start(workdir, fake_gcs, **LONG) as trainer:
        deadline_s = time.monotonic() + 120
        while not CheckpointReader(workdir).steps():
            assert time.monotonic() < deadline_s and trainer.poll() is None, trainer.stdout.read().decode()
            time.sleep(0.05)
        trainer.send_signal(number)
        output = trainer.stdout.read().decode()
        assert trainer.wait(60) == code, output
        assert CheckpointReader(workdir).latest_step() < 40
        assert main(tiny_arguments(workdir, **LONG)) == 0
        assert_bitwise(saved_state(workdir, 40), saved_state(long_run, 40))
        assert_same_metrics(workdir, long_run)


# --- what cannot work ------------------------------------------------------------------------------------------------


def refused(workdir, capsys, monkeypatch) -> str:
    """The one line with which a run ends with 2 before anything compiles."""
    monkeypatch.setattr("aimv2_jax.train.loop.compile_steps", None)
    assert main(tiny_arguments(workdir)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: --workdir"), error
    return error


@pytest.mark.parametrize(
    "kind, only, reason",
    [
        ("401", "", "the bucket refuses access"),  # No credentials.
        ("403", "POST", "the bucket refuses access"),  # No right to write.
        ("403", "DELETE", "the bucket refuses access"),
        ("403", "GET", "the bucket refuses access"),
    ],
)
def test_workdir_in_bucket_refused(failing_gcs, capsys, monkeypatch, kind, only, reason):
    """Without credentials or rights, one line names the workdir and the rights that are needed."""
    fail(failing_gcs, kind, only=only)
    workdir = failing_gcs.new_folder()
    error = refused(workdir, capsys, monkeypatch)
    assert f"{workdir} cannot be used: '{reason}" in error and "read, write and delete" in error


def test_workdir_in_bucket_that_does_not_exist(gcs_folder, capsys, monkeypatch):
    """A bucket that does not exist is not created."""
    error = refused("gs://no-such-bucket/run", capsys, monkeypatch)
    assert "gs://no-such-bucket/run cannot be used: 'no such object or bucket" in error and "Create the bucket" in error


def test_workdir_in_bucket_that_fails(failing_gcs, capsys):
    """A bucket that fails for long at the start ends the run with 75."""
    fail(failing_gcs, "503")
    assert main(tiny_arguments(failing_gcs.new_folder())) == 75
    error = capsys.readouterr().err
    assert "cannot be written: the bucket fails" in error and error.count("\n") == 1


def test_workdir_scheme_without_extra(capsys, monkeypatch):
    """Without the package that reads gs://, one line names the extra; other schemes are refused."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name != "gcsfs" and find_spec(name, *more))
    assert "pip install 'aimv2_jax[gcs]'" in refused("gs://bucket/run", capsys, monkeypatch)
    assert "'s3://bucket/run'. Give a folder, or gs://" in refused("s3://bucket/run", capsys, monkeypatch)
    assert "no such kind of storage: 'ftp://x/run'" in refused("ftp://x/run", capsys, monkeypatch)
