"""Verifies an export: reads it back and compares tensors, and features or embeddings of real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import traverse_util
from PIL import Image

from aimv2_jax.checkpoint.checkpointer import WeightChoice
from aimv2_jax.data import records
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.errors import UserError
from aimv2_jax.export.folder import cast
from aimv2_jax.pretrained.dual_encoder import dual_encoder_of
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.encoder import encoder_of
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights
from aimv2_jax.pretrained.model import load
from aimv2_jax.pretrained.source import open_dual_weights, open_weights
from aimv2_jax.storage.paths import resolve_path

_IMAGES = "package:data/sample/test/photo"
_NUM_IMAGES = 4
# Largest difference of features, in units of the largest entry. Two compiled programs may sum in another order; a dtype
# with n significant bits rounds every tensor by 2^-n, and the errors accumulate over the blocks.
_TOLERANCES = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.25}


def sample_images(count: int = _NUM_IMAGES) -> list[Image.Image]:
    """The first `count` bundled test photographs."""
    source = Source("photo", _IMAGES)
    return [decode_image(records.decode(source.read(index)).image) for index in range(count)]


def check_written(folder: Path, weights: LazyWeights, dtype: str) -> str:
    """Compares `folder` with the `weights` that were written there as `dtype`; returns a line to print.

    Every tensor must equal the source's, rounded to `dtype`, bit for bit; features, or the embeddings of both towers,
    must agree within that rounding.

    Raises:
      UserError: for a value that is too large for `dtype`.
      RuntimeError: for any difference: our bug, or a faulty disk.
    """
    dual = isinstance(weights.spec, DualEncoderSpec)
    written = (open_dual_weights if dual else open_weights)(folder)
    if (written.spec, written.shapes) != (weights.spec, weights.shapes):
        raise RuntimeError(f"{folder} describes another model than was written: {written.spec}, {weights.spec}")
    for name in weights.shapes:
        [source_tensor] = weights.read([name]).values()
        rounded = cast(source_tensor, dtype).astype(np.float32)
        if not np.isfinite(rounded).all():
            raise UserError(f"{name} has values that are not finite in this dtype", dtype, "Export another --dtype")
        [written_tensor] = written.read([name]).values()
        if not np.array_equal(rounded, written_tensor):
            raise RuntimeError(f"{folder} has {name} with other values than were written")
    outputs, what = (_embeddings, "embeddings") if dual else (_features, "features")
    difference = max(_difference(expected, actual) for expected, actual in zip(outputs(weights), outputs(written)))
    if not difference <= _TOLERANCES[dtype]:
        raise RuntimeError(
            f"{folder} gives other {what} than its source: they differ by {difference:.1e} of the largest entry"
        )
    return (
        f"verified: {len(weights.shapes)} tensors are equal bit for bit"
        f"{'' if dtype == 'float32' else f', rounded to {dtype}'}; {what} of {_NUM_IMAGES} images"
        f"{' and texts' if dual else ''} differ by {difference:.1e} of the largest entry"
    )


def _features(weights: LazyWeights[EncoderSpec]) -> Sequence[np.ndarray]:
    """Features of the bundled photographs."""
    return encoder_of(weights)(sample_images())


def _embeddings(weights: LazyWeights[DualEncoderSpec]) -> Sequence[np.ndarray]:
    """Embeddings of the bundled photographs, and of random tokens."""
    text, model = weights.spec.text, dual_encoder_of(weights)
    tokens = np.random.default_rng(0).integers(text.vocab_size, size=(_NUM_IMAGES, text.length))
    tokens[:, -1] = text.end_id
    return model.image_embeddings(sample_images()), model.text_embeddings_of_tokens(tokens)


def check_model(folder: Path, spec: str, weights: WeightChoice) -> str:
    """Compares a whole model: every tensor of encoder and decoder, and the tokenizer's bytes."""
    written, source = load(str(folder)), load(spec, weights)
    expected, actual = (traverse_util.flatten_dict(model.params, sep="/") for model in (source, written))
    if expected.keys() != actual.keys():
        raise RuntimeError(f"{folder} has other tensors than were written: {sorted(expected.keys() ^ actual.keys())}")
    for name, tensor in expected.items():
        if not np.array_equal(tensor, actual[name]):
            raise RuntimeError(f"{folder} has {name} with other values than were written")
    paths = [resolve_path(model.config.tokenizer.path) for model in (source, written)]
    if paths[0].read_bytes() != paths[1].read_bytes():
        raise RuntimeError(f"{folder} has another tokenizer than was written")
    return f"verified: {len(expected)} tensors and the tokenizer are equal bit for bit"


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest difference, in units of the largest entry of `expected`."""
    return float(np.max(np.abs(expected - actual)) / np.max(np.abs(expected)))
