"""Weighted k nearest neighbours, and the floor that raw pixels give. N train pictures, M test pictures, D width."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from aimv2_jax.data import transforms
from aimv2_jax.eval.images import open_image
from aimv2_jax.eval.probes.cache import made_ahead
from aimv2_jax.eval.probes.examples import Examples

TEMPERATURE = 0.07  # Of the vote's weights, exp(cosine / temperature): DINO's, now everybody's.
COUNTS = (1, 5, 10, 20)  # Neighbours: the validation pictures choose.
_FLOOR_SIDE = 16
_PAIRS = 1 << 25  # Of a test and a train picture, that are compared at a time.


def vote(
    train: Float[np.ndarray, "N D"],
    classes: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "M D"],
    counts: tuple[int, ...],
    num_classes: int,
) -> list[Int[np.ndarray, " M"]]:
    """The class of each test picture by its nearest in cosine, for each of `counts` neighbours."""
    train, test = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (train, test))
    found: list[list[np.ndarray]] = [[] for _ in counts]
    most, rows = min(max(counts), len(train)), max(1, _PAIRS // len(train))
    for start in range(0, len(test), rows):
        cosine = test[start : start + rows] @ train.T
        near = np.argpartition(cosine, len(train) - most, axis=1)[:, len(train) - most :]
        order = np.argsort(-np.take_along_axis(cosine, near, axis=1), axis=1, kind="stable")
        near = np.take_along_axis(near, order, axis=1)
        weights = np.exp(np.take_along_axis(cosine, near, axis=1) / TEMPERATURE)
        for number, count in enumerate(counts):
            votes = np.zeros((len(cosine), num_classes))
            for place in range(min(count, most)):
                np.add.at(votes, (np.arange(len(cosine)), classes[near[:, place]]), weights[:, place])
            found[number].append(votes.argmax(axis=1))
    return [np.concatenate(parts) for parts in found]


def pixel_floor(train: Examples, test: Examples) -> Int[np.ndarray, " M"]:
    """What the nearest train picture says of each test picture, by Euclidean distance of 16 x 16 pixels."""
    ours, theirs = (_small(examples) for examples in (train, test))
    found, rows = [], max(1, _PAIRS // len(ours))
    lengths = np.square(ours).sum(1)
    for start in range(0, len(theirs), rows):
        distance = lengths - 2 * theirs[start : start + rows] @ ours.T  # Less what each test picture has anyway.
        found.append(train.classes[distance.argmin(axis=1)])
    return np.concatenate(found)


def _small(examples: Examples) -> Float[np.ndarray, "N 768"]:
    """The whole pictures at 16 x 16, whatever their aspect."""

    def load(place: int) -> np.ndarray:
        picture = open_image(examples.image(place))
        image, box = picture.decode((0, 0, *picture.size), _FLOOR_SIDE)
        return transforms.resize(image, box, _FLOOR_SIDE).astype(np.float32).reshape(-1) / 255

    groups = (range(start, min(start + 64, len(examples))) for start in range(0, len(examples), 64))
    return np.concatenate([np.stack(group) for group in made_ahead(load, groups)])
