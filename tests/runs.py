"""What runs left, compared; and data that a run cannot use."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tiny import tiny_config

from aimv2_jax.data.datasets import write_dataset
from aimv2_jax.data.records import Record
from aimv2_jax.train.checkpoint import CheckpointReader
from aimv2_jax.train.program import build_program


def saved_state(workdir: Path, step: int, **changes):
    """The leaves of a checkpoint's state, on one mesh."""
    reader = CheckpointReader(workdir)
    return jax.device_get(jax.tree.leaves(reader.restore(step, build_program(tiny_config(**changes)).abstract_state)))


def assert_bitwise(one, other):
    assert len(one) == len(other)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other))


def broken_source(folder: Path, good: int, bad: int) -> Path:
    """A data set with `good` pictures and `bad` records that are none."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(buffer, "JPEG")
    captions = {"alt": "a red square", "synthetic": "a picture of a red square"}
    pictures = [Record(f"good-{i}", buffer.getvalue(), captions, {}) for i in range(good)]
    rubbish = [Record(f"bad-{i}", b"not a picture", captions, {}) for i in range(bad)]
    write_dataset(folder, pictures + rubbish)
    return folder
