"""An encoder's parameters where they lie: known by shape, read when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from aimv2_jax.config import Config
from aimv2_jax.export.vision import Vision


@dataclasses.dataclass(frozen=True)
class Trained:
    """Where parameters come from: the run's config, the step, and the folder with its books.

    `evaluated`: whether it is these parameters that the run's held-out losses are of; else they are of an average.
    """

    config: Config
    step: int
    workdir: str
    evaluated: bool = True


@dataclasses.dataclass(frozen=True)
class Weights:
    """An encoder in a file, a folder or a run (`source.open_weights`).

    `source` names it; `shapes` are those of its tensors by our paths ("encoder/trunk/norm/scale"); `left` are the names
    of tensors beside it that belong to something else; `trained` says how it was made, where that is known.
    """

    source: str
    vision: Vision
    shapes: Mapping[str, tuple[int, ...]]
    read_paths: Callable[[Collection[str]], Mapping[str, np.ndarray]]
    left: tuple[str, ...] = ()
    trained: Trained | None = None

    def read(self, paths: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """{path: float32 array} of those that are asked for, or all."""
        return dict(self.read_paths(self.shapes if paths is None else paths))
