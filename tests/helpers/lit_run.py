"""A fixture of a tiny LiT run on the bundled images, whose frozen encoder is that of `trained_run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from aimv2_jax.main import main
from tests.helpers.tiny import TASKS, only_devices, tiny_arguments


@pytest.fixture(scope="session")
def lit_workdir(workdir, tmp_path_factory) -> Path:
    """The run's workdir after three steps; its image tower is the encoder of `workdir` at step 20."""
    folder = tmp_path_factory.mktemp("lit")
    changes = TASKS["lit"] | {
        "init__path": f"{workdir}:20",
        "init__parts": "encoder",
        "init__reinit": "()",
        "model__patch_size": 8,
        "lit__text__depth": 1,
        "data__image_size": 32,
        "train__steps": 3,
        "train__save_every": 3,
        "optimizer__peak_lr": 1e-2,
    }
    with only_devices(1):
        assert main(tiny_arguments(folder, **changes)) == 0
    return folder
