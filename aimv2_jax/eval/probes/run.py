"""Probes from two labelled datasets to predictions on the second. N train, M test images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from aimv2_jax.data.transforms.views import RandomCrop
from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.eval.probes.features import FeatureCache, FeatureSet, prefetch_map
from aimv2_jax.eval.probes.knn import COUNTS, vote
from aimv2_jax.eval.probes.sweep import (
    GRIDS,
    AttentiveHead,
    Batch,
    FeatureNorm,
    LinearHead,
    SweepConfig,
    epoch_batches,
    ordered_batches,
    padded_batch,
    predict,
    train_sweep,
)
from aimv2_jax.pretrained.encoder import PretrainedEncoder
from aimv2_jax.pretrained.images import open_image

Indices = Int[np.ndarray, " P"]

_CROP = dict(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)  # RECIPE.md §11.
_NORM_SAMPLES = 2048  # Train images that estimate mean and variance when every epoch has new crops. [O]


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Settings of a probe. Those from `grid` on, apart from `seed`, are for trained heads only.

    Attributes:
      kind: "attentive" or "linear" for a trained head, "knn" for a vote of the nearest images.
      layer: the block whose output is probed; None: after the final norm.
      encoder_batch: images per batch of the encoder; None: its default.
      cache: folder for computed features; None: they are not stored.
      grid: which of `GRIDS` is trained.
      augment: views of the train images: their mirror images as well, none, or new random crops in every epoch.
      normalise: standardise features by the mean and variance over the train images.
      refit: train the chosen head again on all train images.
      seed: seed of the order, the views and the head's parameters.
    """

    kind: Literal["attentive", "linear", "knn"] = "attentive"
    layer: int | None = None
    encoder_batch: int | None = None
    cache: Path | None = None
    grid: Literal["small", "full"] = "small"
    augment: Literal["flip", "none", "crops"] = "flip"
    epochs: int = 30
    warmup_epochs: int = 3
    batch_size: int = 256
    normalise: bool = True
    refit: bool = True
    seed: int = 0

    def feature_cache(self, encoder: PretrainedEncoder) -> FeatureCache:
        """The cache of the features that this probe reads."""
        pooling = "patches" if self.kind == "attentive" else "mean"
        flips = self.kind != "knn" and self.augment == "flip"
        batch_size = self.encoder_batch or encoder.batch_size
        return FeatureCache(self.cache, encoder, pooling, self.layer, flips, batch_size)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The predicted class of each test image, the chosen hyperparameters, and `seconds` by phase."""

    predicted: np.ndarray
    best: dict[str, Any]
    seconds: dict[str, float]


def knn_probe(
    encoder: PretrainedEncoder,
    datasets: tuple[LabelledDataset, LabelledDataset],
    fit_idx: Indices,
    val_idx: Indices,
    config: ProbeConfig,
) -> ProbeResult:
    """Weighted k nearest neighbours on the mean of the patches; `val_idx` chooses k with `fit_idx` as neighbours."""
    cache = config.feature_cache(encoder)
    feature_sets = [cache(dataset, split) for dataset, split in zip(datasets, ("train", "test"))]
    train, test = (feature_set.features[:, 0, 0].astype(np.float32) for feature_set in feature_sets)
    classes = datasets[0].classes
    start, counts = time.perf_counter(), tuple(k for k in COUNTS if k <= len(fit_idx))
    guesses = vote(train[fit_idx], classes[fit_idx], train[val_idx], counts, len(datasets[0].names))
    scores = [float(np.mean(guess == classes[val_idx])) for guess in guesses]
    best = int(np.argmax(scores))
    [predicted] = vote(train, classes, test, (counts[best],), len(datasets[0].names))
    chosen = {"neighbours": counts[best], "validation_top1": scores[best]}
    return ProbeResult(predicted, chosen, _seconds(feature_sets, start))


def head_probe(
    encoder: PretrainedEncoder,
    datasets: tuple[LabelledDataset, LabelledDataset],
    fit_idx: Indices,
    val_idx: Indices,
    config: ProbeConfig,
) -> ProbeResult:
    """An attentive or linear head.

    The grid is trained on `fit_idx`; its best point on `val_idx` is trained again on both with `config.refit`.
    """
    grid = GRIDS[config.grid]
    width = encoder.spec.width
    num_classes = len(datasets[0].names)
    size = min(config.batch_size, len(fit_idx))
    sweep = SweepConfig(grid, config.epochs, min(config.warmup_epochs, config.epochs - 1), size, config.seed)
    features = (RandomCrops if config.augment == "crops" else CachedFeatures)(config.feature_cache(encoder), datasets)
    start = time.perf_counter()
    is_attentive = config.kind == "attentive"
    head = AttentiveHead(encoder.spec.heads, num_classes) if is_attentive else LinearHead(num_classes)

    def train_on(indices: Indices, sweep: SweepConfig) -> Callable[[Iterator[Batch], int], np.ndarray]:
        norm = features.norm(indices, sweep) if config.normalise else FeatureNorm.identity(width)
        steps_per_epoch = -(-len(indices) // size)
        params = train_sweep(head, norm, sweep, steps_per_epoch, features.epochs(indices, sweep), width)
        return lambda batches, count: np.concatenate(list(predict(head, norm, params, batches)), axis=1)[:, :count]

    score = train_on(fit_idx, sweep)
    log_probability, classes = score(features.train(val_idx, size), len(val_idx)), datasets[0].classes[val_idx]
    accuracy = (log_probability.argmax(-1) == classes).mean(1)
    loss = -log_probability[:, np.arange(len(val_idx)), classes].mean(1)
    best = min(range(len(grid)), key=lambda point: (-accuracy[point], loss[point]))
    if config.refit:  # k-NN and the pixel floor use every train image, too.
        train_idx = np.sort(np.concatenate([fit_idx, val_idx]))
        score = train_on(train_idx, dataclasses.replace(sweep, grid=grid[best : best + 1]))
    predicted = score(features.test(size), len(datasets[1]))[0 if config.refit else best].argmax(-1)
    chosen = {"lr": grid[best][0], "weight_decay": grid[best][1], "validation_top1": float(accuracy[best])}
    return ProbeResult(predicted, chosen, _seconds(features.feature_sets, start))


class CachedFeatures:
    """Train and test batches of a head, from features that are computed once and kept in memory."""

    def __init__(self, cache: FeatureCache, datasets: tuple[LabelledDataset, LabelledDataset]):
        self._classes = datasets[0].classes
        self.feature_sets = [
            cache(datasets[0], "train"),
            dataclasses.replace(cache, flips=False)(datasets[1], "test"),
        ]

    def norm(self, indices: Indices, config: SweepConfig) -> FeatureNorm:
        """Mean and variance over the train images at `indices`."""
        return FeatureNorm.fit(self.feature_sets[0].features, self.feature_sets[0].valid, indices)

    def epochs(self, indices: Indices, config: SweepConfig) -> Iterator[Batch]:
        """The batches of all epochs over the train images at `indices`."""
        train = self.feature_sets[0]
        return epoch_batches(train.features, train.valid, self._classes, indices, config)

    def train(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """The train images at `indices`, in order."""
        return ordered_batches(self.feature_sets[0].features, self.feature_sets[0].valid, indices, batch_size)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """The test images, in order."""
        test = self.feature_sets[1]
        return ordered_batches(test.features, test.valid, np.arange(len(test.features)), batch_size)


class RandomCrops:
    """The same interface with new random crops in every epoch and no stored features, for datasets of any size."""

    feature_sets: Sequence[FeatureSet] = ()

    def __init__(self, cache: FeatureCache, datasets: tuple[LabelledDataset, LabelledDataset]):
        self._cache = cache
        self._datasets = datasets

    def norm(self, indices: Indices, config: SweepConfig) -> FeatureNorm:
        """Mean and variance over a sample of the train images at `indices`."""
        indices = np.random.default_rng(config.seed).permutation(indices)[:_NORM_SAMPLES]
        stream = self._cache.stream(self._datasets[0].take(indices))
        features, valid = (np.concatenate(parts) for parts in zip(*stream))
        return FeatureNorm.fit(features[:, None], valid, np.arange(len(indices)))

    def epochs(self, indices: Indices, config: SweepConfig) -> Iterator[Batch]:
        """The batches of all epochs (`RandomCrop`), decoded ahead of the encoder."""
        dataset, size, chunk = self._datasets[0], config.batch_size, self._cache.batch_size
        view_of = RandomCrop(config.seed, self._cache.encoder.spec.image_size, **_CROP)
        rng = np.random.default_rng(config.seed)

        def crop(example: tuple[int, int]) -> np.ndarray:
            epoch, index = example
            image = open_image(dataset.image(index))
            return view_of(image.size, epoch * len(dataset) + index)(image)

        orders = [(epoch, rng.permutation(indices)) for epoch in range(config.epochs)]
        batches = [
            (epoch, order[start : start + size]) for epoch, order in orders for start in range(0, len(order), size)
        ]
        chunks = (
            [(epoch, int(index)) for index in batch[first : first + chunk]]
            for epoch, batch in batches
            for first in range(0, len(batch), chunk)
        )
        pixels = prefetch_map(crop, chunks)
        for _, batch in batches:
            parts = [self._cache.encode(next(pixels)) for _ in range(0, len(batch), chunk)]
            features, valid = (np.concatenate([part[field] for part in parts]) for field in (0, 1))
            rows = np.arange(len(batch))
            yield padded_batch(features[:, None], valid, dataset.classes[batch], rows, np.zeros_like(rows), size)

    def train(self, indices: Indices, batch_size: int) -> Iterator[Batch]:
        """The train images at `indices`, in order."""
        return self._streamed(self._datasets[0].take(indices))

    def test(self, batch_size: int) -> Iterator[Batch]:
        """The test images, in order."""
        return self._streamed(self._datasets[1])

    def _streamed(self, dataset: LabelledDataset) -> Iterator[Batch]:
        for features, valid in self._cache.stream(dataset):
            yield from ordered_batches(features[:, None], valid, np.arange(len(features)), self._cache.batch_size)


def _seconds(feature_sets: Sequence[FeatureSet], start: float) -> dict[str, float]:
    total, encoder = (sum(feature_set.seconds[part] for feature_set in feature_sets) for part in (0, 1))
    return {"features": total, "encoder": encoder, "probe": time.perf_counter() - start}
