"""Proof of an export: read back, compared tensor by tensor and by features of real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from aimv2_jax.data import records
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.data.sources import Source
from aimv2_jax.eval.encoders import encoder_of
from aimv2_jax.export.source import open_weights
from aimv2_jax.export.transformers import as_type
from aimv2_jax.export.weights import Weights

_PICTURES = "package:data/sample/test/photo"
_COUNT = 4


def sample_pictures(count: int = _COUNT) -> list[Image.Image]:
    """The first of the bundled test photographs."""
    source = Source("photo", _PICTURES)
    return [decode_image(records.decode(source.read(index)).image) for index in range(count)]


def check_written(folder: Path, weights: Weights, dtype: str) -> str:
    """A line about the comparison of `folder` with the `weights` that were written there as `dtype`.

    Every tensor must be the source's, rounded to `dtype`, bit for bit; float32 features must then be equal, too.

    Raises:
      RuntimeError: where they differ: our bug, or a disk that does not keep what it is given.
    """
    written = open_weights(folder)
    ours, theirs = weights.read(), written.read()
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{folder} has other tensors than were written: {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in ours.items():
        if not np.array_equal(as_type(tensor, dtype).astype(np.float32), theirs[name], equal_nan=True):
            raise RuntimeError(f"{folder} has {name} with other numbers than were written")
    pictures = sample_pictures()
    pairs = [(encoder_of(one)(pictures)) for one in (weights, written)]
    difference = max(_difference(a, b) for a, b in zip(*pairs))
    if dtype == "float32" and difference:
        raise RuntimeError(f"{folder} gives other features than its source: by {difference:.1e} of the largest entry")
    return (
        f"read back: {len(ours)} tensors are equal bit for bit{'' if dtype == 'float32' else f', rounded to {dtype}'}; "
        f"features of {len(pictures)} pictures differ by {difference:.1e} of the largest entry"
    )


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in units of the largest entry."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
