"""Starting a run from an encoder of others: what `init.path` may name beside a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax

from aimv2_jax.config import Config
from aimv2_jax.errors import UserError
from aimv2_jax.export.reading import is_foreign, read_weights
from aimv2_jax.export.vision import vision_of
from aimv2_jax.train.warm_start import Donor

# What shapes do not tell: a run with another of these would start from another function. By the key that sets it.
_ALIKE = {
    "heads": "model.encoder.heads",
    "patch_size": "model.patch_size",
    "norm_eps": "model.norm_eps",
    "pixel_mean": "model.pixel_mean",
    "pixel_std": "model.pixel_std",
}


class ForeignDonor:
    """An encoder in Hugging Face's folder, or in a safetensors file in its or Apple's names, for the run of a config.

    Raises:
      UserError: as `read_weights`; and where it has other heads, patches, eps or pixel statistics than the config.
    """

    tokenizer = None

    def __init__(self, config: Config):
        alone = not Path(config.init.path).is_dir()
        self._weights = read_weights(config.init.path, config.model.encoder.heads if alone else None)
        self.name, self.shapes = self._weights.source, self._weights.shapes
        theirs, ours = self._weights.vision, vision_of(config)
        for field, key in _ALIKE.items():
            if getattr(theirs, field) != getattr(ours, field):
                what = f"config init.path was made with another {key}"
                values = f"{getattr(theirs, field)} there, {getattr(ours, field)} here"
                raise UserError(what, values, f"Set {key} to what is there")

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        arrays = self._weights.read(wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, name=name: arrays[name][index])
            for name, leaf in wanted.items()
        }


def find_donor(config: Config) -> Callable[[], Donor] | None:
    """What opens an encoder of others at `init.path`; None where there is none, which leaves it to the loop."""
    path = config.init.path
    return partial(ForeignDonor, config) if path and is_foreign(path) else None
