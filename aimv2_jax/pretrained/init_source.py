"""Initial weights from a Hugging Face or Apple encoder, which `init.path` may name in place of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax

from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.encoder_spec import encoder_spec_of
from aimv2_jax.pretrained.hf_import import is_foreign, read_weights
from aimv2_jax.train.init_from import WeightSource

# Spec fields that do not show in tensor shapes but change the encoder's function, and the config key of each.
_MUST_MATCH = {
    "heads": "model.encoder.heads",
    "patch_size": "model.patch_size",
    "norm_eps": "model.norm_eps",
    "pixel_mean": "model.pixel_mean",
    "pixel_std": "model.pixel_std",
}


class PretrainedWeights:
    """Weights of a Hugging Face folder, or of a safetensors file in its or Apple's names, for a config's run.

    Raises:
      UserError: as `read_weights`; also for heads, patches, eps or pixel statistics that differ from the config.
    """

    tokenizer = None

    def __init__(self, config: Config):
        is_file = not Path(config.init.path).is_dir()
        self._weights = read_weights(config.init.path, config.model.encoder.heads if is_file else None)
        self.name = self._weights.source
        self.shapes = self._weights.shapes
        theirs, ours = self._weights.spec, encoder_spec_of(config)
        for field, key in _MUST_MATCH.items():
            if getattr(theirs, field) != getattr(ours, field):
                what = f"config init.path was made with another {key}"
                values = f"{getattr(theirs, field)} there, {getattr(ours, field)} here"
                raise UserError(what, values, f"Set {key} to the value there")

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        arrays = self._weights.read(wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, name=name: arrays[name][index])
            for name, leaf in wanted.items()
        }


def find_weight_source(config: Config) -> Callable[[], WeightSource] | None:
    """A function that opens the Hugging Face or Apple encoder at `init.path`; None for any other path."""
    path = config.init.path
    return partial(PretrainedWeights, config) if path and is_foreign(path) else None
