"""Helpers that compare checkpoints of runs, and a dataset with bad records."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.train.builder import build_setup
from tests.helpers.tiny import tiny_config


def saved_state(workdir: Path, step: int, **changes):
    """The leaves of a checkpoint's state, on one mesh."""
    reader = CheckpointReader(workdir)
    return jax.device_get(jax.tree.leaves(reader.restore(step, build_setup(tiny_config(**changes)).abstract_state)))


def assert_bitwise(one, other):
    assert len(one) == len(other)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other))


def broken_source(folder: Path, good: int, bad: int) -> Path:
    """Writes a dataset with `good` images and `bad` records that cannot be decoded."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(buffer, "JPEG")
    captions = {"alt": "a red square", "synthetic": "a picture of a red square"}
    images = [Record(f"good-{i}", buffer.getvalue(), captions, {}) for i in range(good)]
    undecodable = [Record(f"bad-{i}", b"not an image", captions, {}) for i in range(bad)]
    write_dataset(folder, images + undecodable)
    return folder
