"""Tests a run that resumes with another Python and jax: the same state, and the same losses within rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.monitoring.metrics import read_metrics
from tests.helpers.runs import assert_bitwise
from tests.helpers.tiny import ROOT

OTHER = os.environ.get("OTHER_PYTHON", "")
BEFORE, COMPARED, AFTER = 10, 5, 10  # Steps.
# Two versions of the compiler may sum in another order: some dozens of float32's roundings (6e-8) after a few steps.
ROUNDING = 2e-6
TRAIN = """
import sys, jax
from tests.helpers import host
print(jax.__version__)
changes = {"train__steps": int(sys.argv[2]), "train__log_every": 1, "mesh__data": 1, "mesh__fsdp": 2}
host.train(host.Path(sys.argv[1]), **changes)
"""
pytestmark = pytest.mark.skipif(
    not OTHER, reason="no Python of the other tier: set OTHER_PYTHON to the one of such an environment"
)


def train(python: str, workdir: Path, steps: int) -> str:
    """Trains or resumes up to a step, with the compiler's optimisations; returns the version of jax."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    command = [python, "-c", TRAIN, str(workdir), str(steps)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[0]


def losses(workdir: Path) -> np.ndarray:
    """Losses and gradient norms of the steps after the restart."""
    lines, _ = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, BEFORE + AFTER + 1))
    names = ("loss", "loss_image", "loss_text", "grad_norm")
    return np.array([[line[name] for name in names] for line in lines[BEFORE:]])


@pytest.mark.parametrize("reverse", [False, True], ids=["from_this", "from_the_other"])
def test_run_continues_on_the_other_tier(tmp_path, reverse):
    """Restores the saved state bit for bit, and has the losses of a run that stays on its tier, within rounding."""
    old, new = (OTHER, sys.executable) if reverse else (sys.executable, OTHER)
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    version = train(old, stays, BEFORE)
    shutil.copytree(stays, moves)
    assert train(old, stays, BEFORE + AFTER) == version
    assert train(new, moves, BEFORE + AFTER) != version
    with np.load(stays / "restored.npz") as one, np.load(moves / "restored.npz") as other:
        assert_bitwise(list(one.values()), list(other.values()))
    ours, theirs = losses(stays), losses(moves)
    difference = np.abs(theirs / ours - 1)
    print(f"largest relative difference by step: {difference.max(axis=1)}")
    assert difference[:COMPARED].max() < ROUNDING
