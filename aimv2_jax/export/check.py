"""Proof of an export: read back, compared tensor by tensor and by features of real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import traverse_util
from PIL import Image

from aimv2_jax.data import records
from aimv2_jax.data.locations import locate
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError
from aimv2_jax.eval.encoders import encoder_of
from aimv2_jax.eval.load import Choice, load
from aimv2_jax.export.source import open_weights
from aimv2_jax.export.transformers import as_type
from aimv2_jax.export.weights import Weights

_PICTURES = "package:data/sample/test/photo"
_COUNT = 4
# Of features, in units of the largest entry. Two compiled programs may add in another order; a type of n bits rounds
# every tensor by 2^-n, which blocks add up.
_BOUNDS = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.25}


def sample_pictures(count: int = _COUNT) -> list[Image.Image]:
    """The first of the bundled test photographs."""
    source = Source("photo", _PICTURES)
    return [decode_image(records.decode(source.read(index)).image) for index in range(count)]


def check_written(folder: Path, weights: Weights, dtype: str) -> str:
    """A line about the comparison of `folder` with the encoder's `weights` that were written there as `dtype`.

    Every tensor must be the source's, rounded to `dtype`, bit for bit; features must then agree as far as that allows.

    Raises:
      UserError: where a number is too large for `dtype`.
      RuntimeError: where they differ: our bug, or a disk that does not keep what it is given.
    """
    written = open_weights(folder)
    if (written.vision, written.shapes) != (weights.vision, weights.shapes):
        raise RuntimeError(f"{folder} describes another model than was written: {written.vision}, {weights.vision}")
    for name in weights.shapes:
        [ours] = weights.read([name]).values()
        rounded = as_type(ours, dtype).astype(np.float32)
        if not np.isfinite(rounded).all():
            raise UserError(f"{name} has numbers that are not finite in this type", dtype, "Export another --dtype")
        [theirs] = written.read([name]).values()
        if not np.array_equal(rounded, theirs):
            raise RuntimeError(f"{folder} has {name} with other numbers than were written")
    pictures = sample_pictures()
    before, after = (encoder_of(one)(pictures) for one in (weights, written))
    difference = max(_difference(ours, theirs) for ours, theirs in zip(before, after))
    if not difference <= _BOUNDS[dtype]:
        raise RuntimeError(f"{folder} gives other features than its source: by {difference:.1e} of the largest entry")
    return (
        f"read back: {len(weights.shapes)} tensors are equal bit for bit"
        f"{'' if dtype == 'float32' else f', rounded to {dtype}'}; features of {len(pictures)} pictures differ by "
        f"{difference:.1e} of the largest entry"
    )


def check_model(folder: Path, spec: str, weights: Choice) -> str:
    """The same for a whole model: every tensor, encoder's and decoder's, and the tokenizer's bytes."""
    written, source = load(str(folder)), load(spec, weights)
    ours, theirs = (traverse_util.flatten_dict(one.params, sep="/") for one in (source, written))
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{folder} has other tensors than were written: {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in ours.items():
        if not np.array_equal(tensor, theirs[name]):
            raise RuntimeError(f"{folder} has {name} with other numbers than were written")
    paths = [locate(one.config.tokenizer.path) for one in (source, written)]
    if paths[0].read_bytes() != paths[1].read_bytes():
        raise RuntimeError(f"{folder} has another tokenizer than was written")
    return f"read back: {len(ours)} tensors and the tokenizer are equal bit for bit"


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, in units of the largest entry."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
