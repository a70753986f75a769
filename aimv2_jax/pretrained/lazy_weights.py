"""Parameters that are read on demand; only their shapes are known up front."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from aimv2_jax.config.schema import Config
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec

Spec = TypeVar("Spec", EncoderSpec, DualEncoderSpec)


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
class LazyWeights(Generic[Spec]):
    """An encoder, or a model with a text tower, in a file, a folder or a run (`source.open_weights`).

    `source` names it. `shapes` are keyed by our parameter paths ("encoder/trunk/norm/scale"). `ignored` names tensors
    of the same file that belong to other parts of the model. `training` is its origin, or None if unknown.
    `statistics_source` says where mean and standard deviation of the pixels come from; `tokenizer` is the file of the
    text tower's tokenizer, if there is one.
    """

    source: str
    spec: Spec
    shapes: Mapping[str, tuple[int, ...]]
    read_paths: Callable[[Collection[str]], Mapping[str, np.ndarray]]
    ignored: tuple[str, ...] = ()
    training: TrainingInfo | None = None
    statistics_source: str = ""
    tokenizer: Path | None = None

    def read(self, paths: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """{path: float32 array} of `paths`, by default of all."""
        return dict(self.read_paths(self.shapes if paths is None else paths))

    @property
    def image(self) -> EncoderSpec:
        """The spec of the image encoder."""
        return self.spec.image if isinstance(self.spec, DualEncoderSpec) else self.spec

    def pixel_statistics(self) -> str:
        """One line with mean and standard deviation of the pixels, and where they come from."""
        mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (self.image.pixel_mean, self.image.pixel_std))
        return f"pixels: mean ({mean}), standard deviation ({std}), {self.statistics_source}"
