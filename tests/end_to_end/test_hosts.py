"""Tests with several hosts as real processes: the same global batches for any number of hosts, and exact counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.monitoring.metrics import read_metrics
from tests.helpers import host
from tests.helpers.runs import assert_bitwise, saved_state
from tests.helpers.several import free_port
from tests.helpers.tiny import ROOT, only_devices

STEPS = 10


def run_hosts(count: int, workdir: Path, devices: int = host.DEVICES, **changes: object) -> None:
    """Trains on `count` hosts, which have `devices` together."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shared = [
        str(count),
        str(devices),
        str(free_port()),
        str(workdir),
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    hosts = []
    try:
        for process in range(count):
            command = [sys.executable, str(ROOT / "tests/helpers/host.py"), str(process), *shared]
            with (workdir.parent / f"host{process}.log").open("w") as log:
                hosts.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        for process, popen in enumerate(hosts):
            assert popen.wait(300) == 0, (workdir.parent / f"host{process}.log").read_text()[-3000:]
    finally:
        for popen in hosts:
            popen.kill()
            popen.wait()


def global_batch(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """The global arrays of a step, concatenated from the shards of all hosts' devices."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for file in workdir.glob(f"batches/{step}.*.npz"):
        with np.load(file) as shards:
            for key in shards:
                name, first = key.split()
                parts.setdefault(name, {})[int(first)] = shards[key]
    return {name: np.concatenate([rows for _, rows in sorted(shards.items())]) for name, shards in parts.items()}


@pytest.fixture(scope="module", autouse=True)
def devices():
    """This process uses as many devices as all hosts together."""
    with only_devices(host.DEVICES):
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run on one host, in this process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    host.train(workdir, data__workers=0)
    return workdir


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} hosts".format)
def together(request, tmp_path_factory) -> Path:
    """A run on two or four hosts with four devices in total, which read by workers."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    workdir.mkdir()
    run_hosts(request.param, workdir, data__workers=1)
    assert len(list(workdir.glob("batches/9.*.npz"))) == request.param
    return workdir


@pytest.fixture(scope="module")
def saved(together, tmp_path_factory) -> Path:
    """The same run after five steps."""
    workdir = shutil.copytree(together, tmp_path_factory.mktemp("saved") / "run")
    shutil.rmtree(workdir / "checkpoints/10")
    for step in range(5, STEPS):
        for file in workdir.glob(f"batches/{step}.*.npz"):
            file.unlink()
    return workdir


def test_global_arrays_when_several_hosts_train(alone, together):
    """The global arrays equal those of one host."""
    for step in range(STEPS):
        one, several = global_batch(alone, step), global_batch(together, step)
        assert one.keys() == several.keys() >= {"patches", "tokens", "valid", "example_index"}
        for name, array in one.items():
            assert len(array) == host.SETTINGS["data__batch_size"]
            np.testing.assert_array_equal(array, several[name], err_msg=f"{name} of step {step}", strict=True)
        assert one["example_index"][:, 1].tolist() == list(range(40 * step, 40 * step + 40))
        assert one["patches"].any() and one["tokens"].any()


def test_counts_when_k_cycles_have_passed_then_k_times_the_weights_summed_over_hosts(alone, together):
    weights = {name: round(host.CYCLE * sum(types.values())) for name, types in host.MIXTURE.items()}
    for workdir in (alone, together):
        lines = read_metrics(workdir)[0]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for half in (lines[:5], lines[5:]):  # Five steps of 40: two cycles.
            counts = {name: sum(line[f"images/{name}"] for line in half) for name in weights}
            assert counts == {name: 2 * n for name, n in weights.items()}


def test_run_when_several_hosts_train(alone, together):
    """There is one set of checkpoints and metrics, and the losses are nearly those of one host."""
    assert CheckpointReader(together).steps() == CheckpointReader(alone).steps() == [5, 10]
    single, several = read_metrics(alone), read_metrics(together)
    for ours, theirs in zip(single[0], several[0], strict=True):
        assert ours["count_image"] == theirs["count_image"]  # The same prefixes.
        # Sums over devices have another order, and Adam's first steps divide small gradients by their own size.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert single[1][-1]["eval_loss"] == pytest.approx(several[1][-1]["eval_loss"], rel=1e-2)


# Layouts that resume the checkpoint of several hosts: number of hosts, devices of all, and their mesh.
LAYOUTS = {
    "1 device": (1, 1, {"data": 1}),
    "2 devices": (1, 2, {"data": 1, "fsdp": 2}),
    "8 devices": (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "2 hosts": (2, 8, {"data": 2, "fsdp": 4}),
}
SLOW = ("2 devices", "8 devices", "2 hosts")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_run_when_it_goes_on_elsewhere(saved, together, tmp_path, layout):
    """State, examples and pixels equal those of the original layout, the losses within rounding."""
    count, devices, mesh = LAYOUTS[layout]
    changes = {f"mesh__{axis}": size for axis, size in mesh.items()} | {"eval__sources": {}}
    workdir = shutil.copytree(saved, tmp_path / "run")
    run_hosts(count, workdir, devices, **changes)
    with np.load(workdir / "restored.npz") as restored:
        assert_bitwise(list(restored.values()), saved_state(saved, 5, **host.SETTINGS))
    for step in range(5, STEPS):
        ours, theirs = global_batch(workdir, step), global_batch(together, step)
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=f"{name} of step {step}", strict=True)
    ours, theirs = ({line["step"]: line["loss"] for line in read_metrics(path)[0]} for path in (workdir, together))
    # Sums have another order. From the same state, the difference stays small over five steps.
    for step in range(6, STEPS + 1):
        assert ours[step] == pytest.approx(theirs[step], rel=2e-6)
