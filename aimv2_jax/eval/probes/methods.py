"""The probes themselves: from two labelled sets to what a probe says of the second. N train, M test pictures."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from aimv2_jax.data.batches import TrainingView
from aimv2_jax.data.clock import StageClock
from aimv2_jax.eval.encoders import LoadedEncoder
from aimv2_jax.eval.images import open_image
from aimv2_jax.eval.probes.cache import FeatureCache, FeatureSet, made_ahead
from aimv2_jax.eval.probes.examples import Examples
from aimv2_jax.eval.probes.heads import AttentiveHead, LinearHead
from aimv2_jax.eval.probes.neighbours import COUNTS, vote
from aimv2_jax.eval.probes.sweep import (
    FULL_GRID,
    SMALL_GRID,
    Batch,
    Plan,
    Standard,
    epochs_of,
    filled,
    in_order,
    predict,
    train,
)

Places = Int[np.ndarray, " P"]

_CROP = dict(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)  # RECIPE.md §11.
_SAMPLE = 2048  # Train pictures whose features tell mean and variance, where crops are new each epoch. [O]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a probe says of each test picture, and how it was chosen. `seconds` by what took them."""

    predicted: np.ndarray
    best: dict[str, Any]
    seconds: dict[str, float]


def neighbours(
    encoder: LoadedEncoder, sets: tuple[Examples, Examples], fit: Places, held: Places, flags: argparse.Namespace
) -> Found:
    """Weighted k nearest neighbours on the mean of the patches; `held` chooses how many, of those in `fit`."""
    cache = FeatureCache(flags.cache, encoder, "mean", flags.layer, False, flags.encoder_batch)
    made = [cache(examples, what) for examples, what in zip(sets, ("train", "test"))]
    known, asked = (one.features[:, 0, 0].astype(np.float32) for one in made)
    classes = sets[0].classes
    start, counts = time.perf_counter(), tuple(k for k in COUNTS if k <= len(fit))
    guesses = vote(known[fit], classes[fit], known[held], counts, len(sets[0].names))
    scores = [float(np.mean(guess == classes[held])) for guess in guesses]
    best = int(np.argmax(scores))
    [predicted] = vote(known, classes, asked, (counts[best],), len(sets[0].names))
    chosen = {"neighbours": counts[best], "validation_top1": scores[best]}
    return Found(predicted, chosen, _seconds(made, start))


def trained_head(
    encoder: LoadedEncoder, sets: tuple[Examples, Examples], fit: Places, held: Places, flags: argparse.Namespace
) -> Found:
    """An attentive or linear head: the grid is trained on `fit`, its best on `held` again on both (`flags.refit`)."""
    attentive, width, names = flags.kind == "attentive", encoder.vision.width, sets[0].names
    pooling = "patches" if attentive else "mean"
    cache = FeatureCache(flags.cache, encoder, pooling, flags.layer, flags.augment == "flip", flags.encoder_batch)
    grid = FULL_GRID if flags.grid == "full" else SMALL_GRID
    size = min(flags.batch_size, len(fit))
    plan = Plan(grid, flags.epochs, min(flags.warmup_epochs, flags.epochs - 1), size, flags.seed)
    views = (NewCrops if flags.augment == "crops" else KeptFeatures)(cache, sets)
    start = time.perf_counter()
    head = AttentiveHead(encoder.vision.heads, len(names)) if attentive else LinearHead(len(names))

    def trained(places: Places, plan: Plan) -> Callable[[Iterator[Batch], int], np.ndarray]:
        standard = views.standard(places, plan) if flags.normalise else Standard.none(width)
        params = train(head, standard, plan, -(-len(places) // size), views.epochs(places, plan), width)
        return lambda batches, count: np.concatenate(list(predict(head, standard, params, batches)), axis=1)[:, :count]

    scored = trained(fit, plan)
    log_probability, classes = scored(views.known(held, size), len(held)), sets[0].classes[held]
    right = (log_probability.argmax(-1) == classes).mean(1)
    loss = -log_probability[:, np.arange(len(held)), classes].mean(1)
    best = min(range(len(grid)), key=lambda point: (-right[point], loss[point]))
    if flags.refit:  # As knn and the floor do, which look at every train picture.
        scored = trained(np.sort(np.concatenate([fit, held])), dataclasses.replace(plan, grid=grid[best : best + 1]))
    predicted = scored(views.asked(size), len(sets[1]))[0 if flags.refit else best].argmax(-1)
    chosen = {"lr": grid[best][0], "weight_decay": grid[best][1], "validation_top1": float(right[best])}
    return Found(predicted, chosen, _seconds(views.made, start))


class KeptFeatures:
    """What a head is trained on and asked, where all features are computed once and kept in memory."""

    def __init__(self, cache: FeatureCache, sets: tuple[Examples, Examples]):
        self._classes = sets[0].classes
        self.made = [cache(sets[0], "train"), dataclasses.replace(cache, flips=False)(sets[1], "test")]

    def standard(self, places: Places, plan: Plan) -> Standard:
        """Mean and variance over the train pictures at `places`."""
        return Standard.of(self.made[0].features, self.made[0].valid, places)

    def epochs(self, places: Places, plan: Plan) -> Iterator[Batch]:
        """The batches of all epochs over the train pictures at `places`."""
        known = self.made[0]
        return epochs_of(known.features, known.valid, self._classes, places, plan)

    def known(self, places: Places, batch_size: int) -> Iterator[Batch]:
        """The train pictures at `places`, in order."""
        return in_order(self.made[0].features, self.made[0].valid, places, batch_size)

    def asked(self, batch_size: int) -> Iterator[Batch]:
        """The test pictures, in order."""
        asked = self.made[1]
        return in_order(asked.features, asked.valid, np.arange(len(asked.features)), batch_size)


class NewCrops:
    """The same where every epoch has new random crops, of which nothing is kept: for sets of any size."""

    made: Sequence[FeatureSet] = ()

    def __init__(self, cache: FeatureCache, sets: tuple[Examples, Examples]):
        self._cache, self._sets = cache, sets

    def standard(self, places: Places, plan: Plan) -> Standard:
        """Mean and variance over some of the train pictures at `places`."""
        places = np.random.default_rng(plan.seed).permutation(places)[:_SAMPLE]
        features, valid = (np.concatenate(parts) for parts in zip(*self._cache.stream(self._sets[0].take(places))))
        return Standard.of(features[:, None], valid, np.arange(len(places)))

    def epochs(self, places: Places, plan: Plan) -> Iterator[Batch]:
        """The batches of all epochs (`TrainingView`), decoded ahead of the encoder."""
        examples, size, part = self._sets[0], plan.batch_size, self._cache.batch_size
        view = TrainingView(plan.seed, self._cache.encoder.vision.image_size, **_CROP)
        rng = np.random.default_rng(plan.seed)

        def crop(one: tuple[int, int]) -> np.ndarray:
            epoch, place = one
            return view(open_image(examples.image(place)), epoch * len(examples) + place, 0, StageClock())

        orders = [(epoch, rng.permutation(places)) for epoch in range(plan.epochs)]
        batches = [
            (epoch, order[start : start + size]) for epoch, order in orders for start in range(0, len(order), size)
        ]
        groups = (
            [(epoch, int(place)) for place in batch[first : first + part]]
            for epoch, batch in batches
            for first in range(0, len(batch), part)
        )
        pixels = made_ahead(crop, groups)
        for _, batch in batches:
            parts = [self._cache.encode(next(pixels)) for _ in range(0, len(batch), part)]
            features, valid = (np.concatenate([made[kind] for made in parts]) for kind in (0, 1))
            rows = np.arange(len(batch))
            yield filled(features[:, None], valid, examples.classes[batch], rows, np.zeros_like(rows), size)

    def known(self, places: Places, batch_size: int) -> Iterator[Batch]:
        """The train pictures at `places`, in order."""
        return self._streamed(self._sets[0].take(places))

    def asked(self, batch_size: int) -> Iterator[Batch]:
        """The test pictures, in order."""
        return self._streamed(self._sets[1])

    def _streamed(self, examples: Examples) -> Iterator[Batch]:
        for features, valid in self._cache.stream(examples):
            yield from in_order(features[:, None], valid, np.arange(len(features)), self._cache.batch_size)


def _seconds(made: Sequence[FeatureSet], start: float) -> dict[str, float]:
    whole, inside = (sum(one.seconds[kind] for one in made) for kind in (0, 1))
    return {"features": whole, "encoder": inside, "probe": time.perf_counter() - start}
