"""Encoder parameters that are read on demand; only their shapes are known up front."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from aimv2_jax.config.schema import Config
from aimv2_jax.pretrained.encoder_spec import EncoderSpec


@dataclasses.dataclass(frozen=True)
class TrainingInfo:
    """Origin of parameters: the run's config, the step, and the workdir with its metrics.

    `evaluated`: the run's held-out losses belong to these parameters; otherwise they belong to an average.
    """

    config: Config
    step: int
    workdir: str
    evaluated: bool = True


@dataclasses.dataclass(frozen=True)
class LazyWeights:
    """An encoder in a file, a folder or a run (`source.open_weights`).

    `source` names it. `shapes` are keyed by our parameter paths ("encoder/trunk/norm/scale"). `ignored` names tensors
    of the same file that belong to other parts of the model. `training` is its origin, or None if unknown.
    """

    source: str
    spec: EncoderSpec
    shapes: Mapping[str, tuple[int, ...]]
    read_paths: Callable[[Collection[str]], Mapping[str, np.ndarray]]
    ignored: tuple[str, ...] = ()
    training: TrainingInfo | None = None

    def read(self, paths: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """{path: float32 array} of `paths`, by default of all."""
        return dict(self.read_paths(self.shapes if paths is None else paths))
