"""An encoder's parameters where they lie: known by shape, read when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aimv2_jax.config import Config
from aimv2_jax.export.vision import Vision


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where parameters come from: the run's config, the step, and the folder with its books."""

    config: Config
    step: int
    workdir: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """An encoder in a file, a folder or a run (`source.open_weights`).

    `source` names it; `shapes` are those of its tensors by our paths ("encoder/trunk/norm/scale"); `left` are the names
    of tensors beside it that belong to something else; `trained` says how it was made, where that is known.
    """

    source: str
    vision: Vision
    shapes: Mapping[str, tuple[int, ...]]
    read_paths: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]
    left: tuple[str, ...] = ()
    trained: Trained | None = None

    def read(self, paths: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """{path: float32 array} of those that are asked for, or all."""
        return dict(self.read_paths(self.shapes if paths is None else paths))
