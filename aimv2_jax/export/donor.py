"""Starting a run from an encoder of others: what `init.path` may name beside a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax

from aimv2_jax.export.reading import is_foreign, read_weights
from aimv2_jax.train.warm_start import Donor


class ForeignDonor:
    """An encoder in Hugging Face's folder, or in a safetensors file in its or Apple's names.

    Raises:
      UserError: as `read_weights`.
    """

    def __init__(self, path: str):
        self._weights = read_weights(path)
        self.name, self.shapes = self._weights.source, self._weights.shapes

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, jax.Array]:
        arrays = self._weights.read(wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index, name=name: arrays[name][index])
            for name, leaf in wanted.items()
        }


def find_donor(path: str) -> Callable[[], Donor] | None:
    """What opens an encoder of others at `path`; None where there is none, which leaves it to the loop."""
    return partial(ForeignDonor, path) if path and is_foreign(path) else None
