"""Weights from a Hugging Face or Apple encoder, which `init.path` and `distill.path` may name in place of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax

from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.encoder_spec import EncoderSpec, encoder_spec_of
from aimv2_jax.pretrained.hf_import import is_foreign, read_weights
from aimv2_jax.train.init_from import WeightSource

# Spec fields of preprocessing and norms, which do not show in tensor shapes, and the config key of each.
SHARED_FIELDS = {
    "patch_size": "model.patch_size",
    "norm_eps": "model.norm_eps",
    "pixel_mean": "model.pixel_mean",
    "pixel_std": "model.pixel_std",
}


class PretrainedWeights:
    """Weights of a Hugging Face folder, or of a safetensors file in its or Apple's names, for a run.

    Args:
      path: the folder or file.
      heads: attention heads of a file, which does not contain them.

    Raises:
      UserError: as `read_weights`.
    """

    tokenizer = None

    def __init__(self, path: str, heads: int):
        self._weights = read_weights(path, None if Path(path).is_dir() else heads)
        self.name = self._weights.source
        self.shapes = self._weights.shapes
        self.spec = self._weights.spec

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        arrays = self._weights.read(wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, name=name: arrays[name][index])
            for name, leaf in wanted.items()
        }


def find_weight_source(config: Config) -> Callable[[], WeightSource] | None:
    """A function that opens the Hugging Face or Apple encoder at `init.path`; None for any other path."""
    path = config.init.path
    return partial(_open_init, config) if path and is_foreign(path) else None


def _open_init(config: Config) -> PretrainedWeights:
    """Opens the encoder at `init.path`; raises UserError for heads, patches, eps or statistics that differ."""
    weights = PretrainedWeights(config.init.path, config.model.encoder.heads)
    fields = {"heads": "model.encoder.heads", **SHARED_FIELDS}
    check_fields("init.path", weights.spec, encoder_spec_of(config), fields)
    return weights


def check_fields(source: str, theirs: EncoderSpec, ours: EncoderSpec, fields: Mapping[str, str]) -> None:
    """Raises UserError for the first of `fields` that differs; `fields` maps fields to config keys, `source` is one."""
    for field, key in fields.items():
        check_equal(source, key, getattr(theirs, field), getattr(ours, field))


def check_equal(source: str, key: str, theirs: object, ours: object) -> None:
    """Raises UserError if a value of the model at the config key `source` is not that of config `key`."""
    if theirs != ours:
        what = f"config {source} was made with another {key}"
        raise UserError(what, f"{theirs} there, {ours} here", f"Set {key} to the value there")
