"""Settings of a probe: the paper's (Table A2) and quick ones, and what differs from the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from aimv2_jax.eval.probes.features import FeatureCache
from aimv2_jax.pretrained.encoder import PretrainedEncoder


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Settings of a probe. Those from `grid` on, apart from `seed` and `validation`, are for trained heads only.

    Attributes:
      kind: "attentive" or "linear" for a trained head, "knn" for a vote of the nearest images.
      layer: the block whose output is probed; None: after the final norm.
      encoder_batch: images per batch of the encoder; None: its default.
      cache: folder for computed features; None: they are not stored.
      grid: which of `sweep.GRIDS` is trained.
      augment: views of the train images: their mirror images as well, none, new random crops in every epoch, or those
        with RandAugment and colour jitter.
      min_lr: rate at the end of the cosine.
      clip_norm: largest norm of the gradient of one point of the grid; None: no clipping.
      decay: weight decay of matrices only, or of all parameters.
      norm: features are standardised by BatchNorm, by the mean and variance over the train images, or not at all.
      validation: share of the train images that chooses the best point; None: the test images do.
      refit: train the chosen head again on all train images.
      seed: seed of the split, the order, the views and the head's parameters.
    """

    kind: Literal["attentive", "linear", "knn"] = "attentive"
    layer: int | None = None
    encoder_batch: int | None = None
    cache: Path | None = None
    grid: Literal["small", "full"] = "small"
    augment: Literal["flip", "none", "crops", "randaugment"] = "flip"
    epochs: int = 30
    warmup_epochs: int = 3
    batch_size: int = 256
    min_lr: float = 0.0
    clip_norm: float | None = None
    decay: Literal["matrices", "all"] = "matrices"
    norm: Literal["train", "batch", "none"] = "train"
    validation: float | None = 0.15
    refit: bool = True
    seed: int = 0

    @property
    def random_views(self) -> bool:
        """Whether the encoder runs on new views in every epoch, so that no features are kept."""
        return self.augment in ("crops", "randaugment")

    def feature_cache(self, encoder: PretrainedEncoder) -> FeatureCache:
        """The cache of the features that this probe reads."""
        pooling = "patches" if self.kind == "attentive" else "mean"
        flips = self.kind != "knn" and self.augment == "flip"
        batch_size = self.encoder_batch or encoder.batch_size
        return FeatureCache(self.cache, encoder, pooling, self.layer, flips, batch_size)


QUICK = ProbeConfig()
PAPER = ProbeConfig(
    grid="full", augment="randaugment", epochs=100, warmup_epochs=0, batch_size=512, min_lr=1e-5, clip_norm=3.0,
    decay="all", norm="batch", validation=None,
)  # fmt: skip
"""Table A2 for sets other than ImageNet-1k [P]; `decay` and `norm` are not in it (RECIPE.md §11)."""
PAPER_IMAGENET = dataclasses.replace(PAPER, warmup_epochs=5, batch_size=1024)
"""Table A2 for ImageNet-1k [P]."""

# Fields of the paper's protocol as they are called in reports.
_NAMES = {
    "layer": "layer", "grid": "grid", "augment": "augmentation", "epochs": "epochs", "warmup_epochs": "warm-up epochs",
    "batch_size": "batch", "min_lr": "minimum rate", "clip_norm": "gradient clip", "decay": "weight decay on",
    "norm": "normalisation",
}  # fmt: skip

_IMAGENET_CLASSES = 1000

NOT_STATED = (
    "weight decay acts on all parameters of the head",
    "the gradient of each grid point is clipped by itself, and warm-up starts at 0",
    "an epoch has every train image once: its last batch is smaller",
    "RandAugment fills with the mean colour and interpolates bicubically; colour jitter follows it (timm's "
    "create_transform would leave the jitter out)",
    "test images are the centre square at the model's resolution",
)
"""What Table A2 leaves open, and how it is here."""


def protocol_notes(config: ProbeConfig, reference: ProbeConfig, train_images: int, num_classes: int) -> dict[str, Any]:
    """`name` of the protocol, what `differs` from the paper, and what is `not_stated` in the paper; texts.

    Args:
      config: the probe's settings.
      reference: the protocol that it follows, one of the constants above.
      train_images: number of images with a label, which limits the batch.
      num_classes: number of classes.
    """
    if reference == QUICK:
        return {"name": "quick, which is not the paper's", "differs": [], "not_stated": []}
    column = "ImageNet-1k" if reference == PAPER_IMAGENET else "sets other than ImageNet-1k"
    if reference == PAPER and num_classes == _IMAGENET_CLASSES:
        column += "; if this is ImageNet-1k, give --imagenet"
    differs = _differences(config, reference, train_images)
    return {"name": f"the paper's, Table A2, {column}", "differs": differs, "not_stated": list(NOT_STATED)}


def notes_text(notes: Mapping[str, Any]) -> str:
    """The notes as lines of text."""
    lines = [f"protocol: {notes['name']}"]
    lines += [f"differs from the paper: {line}" for line in notes["differs"]]
    lines += [f"not stated in the paper: {line}" for line in notes["not_stated"]]
    return "\n".join(lines)


def _differences(config: ProbeConfig, reference: ProbeConfig, train_images: int) -> list[str]:
    lines = ["features are rounded to float16 before the head"]
    for field, name in _NAMES.items():
        ours, theirs = getattr(config, field), getattr(reference, field)
        if ours != theirs:
            lines.append(f"{name} {_text(field, ours)} (paper: {_text(field, theirs)})")
    if train_images < config.batch_size:
        lines.append(f"batch {train_images}, all train images (paper: {reference.batch_size})")
    if config.validation is not None:
        refit = ", and its head trained again on all of them" if config.refit else ""
        lines.append(f"the best point is chosen on {config.validation:.0%} of the train images{refit}")
    return lines


def _text(field: str, value: object) -> str:
    if value is None:
        return "after the final norm" if field == "layer" else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
