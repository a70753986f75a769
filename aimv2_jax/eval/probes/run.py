"""Probes from two labelled datasets to predictions on the second. N train, M test images, G points of the grid."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.eval.probes.features import FeatureCache, FeatureSet
from aimv2_jax.eval.probes.head_batches import CachedFeatures, RandomViews
from aimv2_jax.eval.probes.knn import COUNTS, vote
from aimv2_jax.eval.probes.protocol import ProbeConfig
from aimv2_jax.eval.probes.sweep import (
    GRIDS,
    AttentiveHead,
    FeatureNorm,
    LinearHead,
    SweepConfig,
    predict,
    train_sweep,
)
from aimv2_jax.pretrained.encoder import PretrainedEncoder

Indices = Int[np.ndarray, " P"]
Datasets = tuple[LabelledDataset, LabelledDataset]
"""Train and test."""
KeptFeatures = tuple[FeatureSet, FeatureSet]
"""Features of train and test images."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The predicted class of each test image, the chosen hyperparameters, and `seconds` by phase.

    `grid` has the accuracy of every point on the images that chose the best one.
    """

    predicted: np.ndarray
    best: dict[str, Any]
    seconds: dict[str, float]
    grid: list[dict[str, Any]]


def kept_features(cache: FeatureCache, datasets: Datasets) -> KeptFeatures:
    """The features of both datasets; those of the test images are of the evaluation crop only."""
    return cache(datasets[0], "train"), dataclasses.replace(cache, flips=False)(datasets[1], "test")


def knn_probe(
    encoder: PretrainedEncoder,
    datasets: Datasets,
    fit_idx: Indices,
    val_idx: Indices,
    config: ProbeConfig,
    kept: KeptFeatures | None = None,
) -> ProbeResult:
    """Weighted k nearest neighbours on the mean of the patches; `val_idx` chooses k with `fit_idx` as neighbours.

    `kept` are means of the patches; by default they are computed.
    """
    kept = kept or kept_features(config.feature_cache(encoder), datasets)
    train, test = (feature_set.features[:, 0, 0].astype(np.float32) for feature_set in kept)
    classes = datasets[0].classes
    start, counts = time.perf_counter(), tuple(k for k in COUNTS if k <= len(fit_idx))
    guesses = vote(train[fit_idx], classes[fit_idx], train[val_idx], counts, len(datasets[0].names))
    scores = [float(np.mean(guess == classes[val_idx])) for guess in guesses]
    best = int(np.argmax(scores))
    [predicted] = vote(train, classes, test, (counts[best],), len(datasets[0].names))
    chosen = {"neighbours": counts[best], "validation_top1": scores[best]}
    grid = [{"neighbours": count, "top1": score} for count, score in zip(counts, scores)]
    return ProbeResult(predicted, chosen, _seconds(kept, start), grid)


def head_probe(
    encoder: PretrainedEncoder,
    datasets: Datasets,
    fit_idx: Indices,
    val_idx: Indices,
    config: ProbeConfig,
    kept: KeptFeatures | None = None,
) -> ProbeResult:
    """An attentive or linear head.

    The grid is trained on `fit_idx`; its best point on `val_idx` is trained again on both with `config.refit`. Without
    `val_idx`, the best point is that on the test images. `kept` are features for a head without random views; by
    default they are computed.
    """
    points = GRIDS[config.grid]
    size = min(config.batch_size, len(fit_idx))
    sweep = SweepConfig(
        points, config.epochs, min(config.warmup_epochs, config.epochs - 1), size, config.seed,
        config.min_lr, config.clip_norm, config.decay,
    )  # fmt: skip
    features: RandomViews | CachedFeatures
    if config.random_views:
        features = RandomViews(config.feature_cache(encoder), datasets, config.augment == "randaugment")
    else:
        features = CachedFeatures(kept or kept_features(config.feature_cache(encoder), datasets), datasets)
    start = time.perf_counter()
    num_classes = len(datasets[0].names)
    is_attentive = config.kind == "attentive"
    head = AttentiveHead(encoder.spec.heads, num_classes) if is_attentive else LinearHead(num_classes)

    def train_on(indices: Indices, sweep: SweepConfig) -> Callable[..., _Scores]:
        norm = features.norm(indices, sweep) if config.norm == "train" else None
        if config.norm == "none":
            norm = FeatureNorm.identity(encoder.spec.width)
        steps_per_epoch = -(-len(indices) // size)
        batches = features.epochs(indices, sweep)
        trained = train_sweep(head, norm, sweep, steps_per_epoch, batches, encoder.spec.width)
        return lambda batches, classes: _scores(predict(head, trained.norm, trained.params, batches), classes)

    score = train_on(fit_idx, sweep)
    test_classes = datasets[1].classes
    on_test = not len(val_idx)
    if on_test:
        scores = score(features.test(size), test_classes)
    else:
        scores = score(features.train(val_idx, size), datasets[0].classes[val_idx])
    best = min(range(len(points)), key=lambda point: (-scores.accuracy[point], scores.loss[point]))
    if on_test:
        predicted = scores.predicted[best]
    elif config.refit:  # k-NN and the pixel floor use every train image, too.
        score = train_on(np.sort(np.concatenate([fit_idx, val_idx])), dataclasses.replace(sweep, grid=(points[best],)))
        [predicted] = score(features.test(size), test_classes).predicted
    else:
        predicted = score(features.test(size), test_classes).predicted[best]
    grid = [
        {"lr": lr, "weight_decay": decay, "top1": float(top1)} for (lr, decay), top1 in zip(points, scores.accuracy)
    ]
    name = "test_top1" if on_test else "validation_top1"
    chosen = {"lr": points[best][0], "weight_decay": points[best][1], name: float(scores.accuracy[best])}
    return ProbeResult(predicted, chosen, _seconds(features.feature_sets, start), grid)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Predicted classes of every point of the grid, their accuracy and cross-entropy."""

    predicted: Int[np.ndarray, "G M"]
    accuracy: Float[np.ndarray, " G"]
    loss: Float[np.ndarray, " G"]


def _scores(log_probability: Iterator[Float[np.ndarray, "G B C"]], classes: Int[np.ndarray, " M"]) -> _Scores:
    """The scores of log-probabilities, which come a padded batch at a time, in the order of `classes`."""
    predicted, losses, start = [], [], 0
    for batch in log_probability:
        true = classes[start : start + batch.shape[1]]
        batch = batch[:, : len(true)]
        predicted.append(batch.argmax(-1))
        losses.append(-batch[:, np.arange(len(true)), true])
        start += len(true)
    guesses = np.concatenate(predicted, axis=1)
    return _Scores(guesses, (guesses == classes).mean(1), np.concatenate(losses, axis=1).mean(1))


def _seconds(feature_sets: Sequence[FeatureSet], start: float) -> dict[str, float]:
    total, encoder = (sum(feature_set.seconds[part] for feature_set in feature_sets) for part in (0, 1))
    return {"features": total, "encoder": encoder, "probe": time.perf_counter() - start}
