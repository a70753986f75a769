"""A workdir in a bucket: the same run as on a disk, stopped and continued, and all of its files there."""

from __future__ import annotations

import pytest
from bucket import NAME, stand_in, stand_in_for_arrays
from runs import assert_bitwise, broken_source, saved_state
from tiny import tiny_arguments

from aimv2_jax.main import main
from aimv2_jax.train.checkpoint import CheckpointReader, parse_spec
from aimv2_jax.train.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("shared-memory")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    root = stand_in(tmp_path / "bucket", monkeypatch)
    stand_in_for_arrays(root, monkeypatch)
    return root


def test_run_when_its_workdir_is_in_a_bucket_then_that_of_a_disk_and_goes_on_exactly(bucket, tmp_path, capsys):
    data = broken_source(tmp_path / "data", good=50, bad=1)
    changes = dict(data__sources__photo=data, data__max_bad_fraction=0.5, eval__max_examples=8)
    workdir, disk = f"{NAME}/runs/one", tmp_path / "disk"
    for place in (workdir, disk):
        assert main(tiny_arguments(place, train__steps=10, train__save_every=5, train__keep=1, **changes)) == 0
    assert "in a bucket, which has no locks" in capsys.readouterr().out
    assert main(tiny_arguments(workdir, train__profile="(12, 14)", **changes)) == 0
    assert main(tiny_arguments(disk, **changes)) == 0
    assert "continuing from step 10" in capsys.readouterr().out
    assert CheckpointReader(workdir).steps() == CheckpointReader(disk).steps() == [10, 20]
    assert CheckpointReader(workdir).best_step() == parse_spec(workdir)[1]
    assert_bitwise(saved_state(workdir, 20), saved_state(disk, 20))
    here = bucket / "runs/one"
    for name in ("config.txt", "bad_records.jsonl"):
        assert (here / name).read_bytes() == (disk / name).read_bytes()
    ours, theirs = read_metrics(workdir), read_metrics(disk)
    assert [[line["step"] for line in part] for part in ours] == [[line["step"] for line in part] for part in theirs]
    assert [line["loss"] for line in ours[0]] == [line["loss"] for line in theirs[0]]
    assert len(list((here / "tensorboard").iterdir())) == 2
    assert all(file.stat().st_size > 1000 for file in (here / "tensorboard").iterdir())
    assert list((here / "profile").rglob("*.xplane.pb"))
    assert not (here / "lock").exists() and not list(here.rglob("*.part"))
