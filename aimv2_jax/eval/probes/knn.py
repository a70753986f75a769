"""Weighted k-NN classification, and the raw-pixel floor. N train images, M test images, D width."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from aimv2_jax.data.transforms.views import View
from aimv2_jax.eval.probes.dataset import LabelledDataset
from aimv2_jax.eval.probes.features import prefetch_map
from aimv2_jax.pretrained.images import open_image

TEMPERATURE = 0.07  # A vote's weight is exp(cosine / TEMPERATURE), with DINO's value.
DINO_COUNTS = (10, 20, 100, 200)
"""Numbers of neighbours in DINO's protocol (arXiv 2104.14294), which reports the best one on the test images."""
COUNTS = (1, 5, 10, 20)  # Candidate numbers of neighbours; the validation images choose among them.
_FLOOR_SIDE = 16
_MAX_PAIRS = 1 << 25  # Pairs of a test and a train image that are compared at a time.


def vote(
    train: Float[np.ndarray, "N D"],
    classes: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "M D"],
    counts: tuple[int, ...],
    num_classes: int,
) -> list[Int[np.ndarray, " M"]]:
    """The class of each test image by the vote of its nearest train images in cosine, for each of `counts`."""
    train, test = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (train, test))
    predicted: list[list[np.ndarray]] = [[] for _ in counts]
    most, rows = min(max(counts), len(train)), max(1, _MAX_PAIRS // len(train))
    for start in range(0, len(test), rows):
        cosine = test[start : start + rows] @ train.T
        near = np.argpartition(cosine, len(train) - most, axis=1)[:, len(train) - most :]
        order = np.argsort(-np.take_along_axis(cosine, near, axis=1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        weights = np.exp(np.take_along_axis(cosine, near, axis=1) / TEMPERATURE)
        for index, count in enumerate(counts):
            votes = np.zeros((len(cosine), num_classes))
            for rank in range(min(count, most)):
                np.add.at(votes, (np.arange(len(cosine)), classes[near[:, rank]]), weights[:, rank])
            predicted[index].append(votes.argmax(axis=1))
    return [np.concatenate(parts) for parts in predicted]


def pixel_floor(train: LabelledDataset, test: LabelledDataset) -> Int[np.ndarray, " M"]:
    """The class of each test image's nearest train image, by Euclidean distance of 16 x 16 pixels."""
    train_pixels, test_pixels = (_thumbnails(dataset) for dataset in (train, test))
    predicted, rows = [], max(1, _MAX_PAIRS // len(train_pixels))
    train_norms = np.square(train_pixels).sum(1)
    for start in range(0, len(test_pixels), rows):
        # The squared norm of the test image is the same for every train image and is left out.
        distance = train_norms - 2 * test_pixels[start : start + rows] @ train_pixels.T
        predicted.append(train.classes[distance.argmin(axis=1)])
    return np.concatenate(predicted)


def _thumbnails(dataset: LabelledDataset) -> Float[np.ndarray, "N 768"]:
    """Whole images at 16 x 16, regardless of aspect ratio."""

    def load(index: int) -> np.ndarray:
        image = open_image(dataset.image(index))
        pixels = View(_FLOOR_SIDE, (0, 0, *image.size))(image)
        return pixels.astype(np.float32).reshape(-1) / 255

    groups = (range(start, min(start + 64, len(dataset))) for start in range(0, len(dataset), 64))
    return np.concatenate([np.stack(group) for group in prefetch_map(load, groups)])
