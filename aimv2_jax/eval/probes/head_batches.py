"""Train and test batches of a head: from kept features, or from new random views in every epoch. P images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from aimv2_jax.data.transforms.color_jitter import ColorJitter
from aimv2_jax.data.transforms.rand_augment import RandAugment
from aimv2_jax.data.transforms.views import RandomCrop
from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.eval.probes.features import FeatureCache, FeatureSet, prefetch_map
from aimv2_jax.eval.probes.sweep import Batch, FeatureNorm, SweepConfig, epoch_batches, ordered_batches, padded_batch
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.images import NamedImage, open_image

Indices = Int[np.ndarray, " P"]

_CROP = dict(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)  # RECIPE.md §11.
_JITTER = 0.3  # RECIPE.md §11.
_NORM_SAMPLES = 2048  # Train images that estimate mean and variance when every epoch has new crops. [O]


class CachedFeatures:
    """Train and test batches of a head, from features that are computed once and kept in memory."""

    def __init__(self, feature_sets: tuple[FeatureSet, FeatureSet], datasets: tuple[LabelledDataset, LabelledDataset]):
        self._classes = datasets[0].classes
        self.feature_sets = feature_sets

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


class RandomViews:
    """The same interface with new random views in every epoch and no stored features, for datasets of any size."""

    feature_sets: Sequence[FeatureSet] = ()

    def __init__(self, cache: FeatureCache, datasets: tuple[LabelledDataset, LabelledDataset], augmented: bool = False):
        """`augmented` adds RandAugment and colour jitter to crops and flips."""
        self._cache = cache
        self._datasets = datasets
        self._augmented = augmented

    def norm(self, indices: Indices, config: SweepConfig) -> FeatureNorm:
        """Mean and variance over a sample of the train images at `indices`."""
        indices = np.random.default_rng(config.seed).permutation(indices)[:_NORM_SAMPLES]
        stream = self._cache.stream(self._datasets[0].take(indices))
        features, valid = (np.concatenate(parts) for parts in zip(*stream))
        return FeatureNorm.fit(features[:, None], valid, np.arange(len(indices)))

    def epochs(self, indices: Indices, config: SweepConfig) -> Iterator[Batch]:
        """The batches of all epochs (`random_view`), decoded ahead of the encoder."""
        dataset, size, chunk = self._datasets[0], config.batch_size, self._cache.batch_size
        view = random_view(self._cache.encoder.spec, config.seed, self._augmented)
        rng = np.random.default_rng(config.seed)

        def pixels_of(example: tuple[int, int]) -> np.ndarray:
            epoch, index = example
            return view(dataset.image(index), epoch * len(dataset) + index)

        orders = [(epoch, rng.permutation(indices)) for epoch in range(config.epochs)]
        batches = [
            (epoch, order[start : start + size]) for epoch, order in orders for start in range(0, len(order), size)
        ]
        chunks = (
            [(epoch, int(index)) for index in batch[first : first + chunk]]
            for epoch, batch in batches
            for first in range(0, len(batch), chunk)
        )
        pixels = prefetch_map(pixels_of, chunks)
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


def random_view(
    spec: EncoderSpec, seed: int, augmented: bool
) -> Callable[[NamedImage, int], UInt8[np.ndarray, "H W 3"]]:
    """(image, example number) -> a random crop at the encoder's resolution, perhaps flipped.

    With `augmented`, RandAugment and colour jitter follow. The result is a function of `seed` and the example number.
    """
    crop = RandomCrop(seed, spec.image_size, **_CROP)
    red, green, blue = (min(255, round(255 * mean)) for mean in spec.pixel_mean)
    augment, jitter = RandAugment(seed, (red, green, blue)), ColorJitter(seed, _JITTER)

    def view(image: NamedImage, example: int) -> np.ndarray:
        opened = open_image(image)
        pixels = crop(opened.size, example)(opened)
        if not augmented:
            return pixels
        return np.asarray(jitter(augment(Image.fromarray(pixels), example), example))

    return view
